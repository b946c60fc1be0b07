# ImageNet where we keep it. The library's configs set the dataloaders themselves, and
# `_base_` files must not share a key, so every leaf merges `imagenet` into its own.
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

data_root = 'data/imagenet/'
imagenet = dict(dataset=dict(data_root=data_root))
