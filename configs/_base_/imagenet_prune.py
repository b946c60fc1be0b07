# Settings shared by the pruning runs on ImageNet. They stand under `pruning` because
# the library's configs set the same keys; every leaf puts them in their places.
_base_ = ['./imagenet.py']

pruning = dict(
    train_dataloader=dict(
        sampler=dict(type='InfiniteSampler', shuffle=True),
        dataset=dict(data_root={{_base_.data_root}}),
    ),
    default_hooks=dict(
        checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=1)
    ),
    hook=dict(
        type='FisherPruningHook',
        interval=25,  # the paper's for classification (algorithm 2)
        normalize='memory',
        target=dict(flops=0.5),
        input_shape=(3, 224, 224),
    ),
)
log_processor = dict(by_epoch=False)
