# The run-time settings that our small experiments share.
_base_ = ['mmdet::_base_/default_runtime.py']

custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)
randomness = dict(seed=0, deterministic=True)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=5, max_keep_ckpts=1),
)
