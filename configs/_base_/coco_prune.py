# Settings shared by the pruning runs on COCO (paper section 6: no frozen stages, a
# decision each 10 iterations). They stand under `pruning` because the library's configs
# set the same keys; every leaf puts them in their places.
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

max_iters = 143_000  # an upper bound: the hook stops at its target
pruning = dict(
    model=dict(backbone=dict(frozen_stages=-1, init_cfg=None)),
    train_cfg=dict(
        _delete_=True,
        type='IterBasedTrainLoop',
        max_iters=max_iters,
        val_interval=max_iters,
    ),
    train_dataloader=dict(sampler=dict(type='InfiniteSampler', shuffle=True)),
    default_hooks=dict(
        checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=1)
    ),
    log_processor=dict(by_epoch=False),
    hook=dict(
        type='FisherPruningHook',
        interval=10,
        normalize='memory',
        target=dict(flops=0.5),
        input_shape=(3, 800, 1280),
    ),
)
