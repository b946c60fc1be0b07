"""Detect objects in an image by an end-to-end ONNX file, without PyTorch.

Needed: numpy, Pillow, onnxruntime.
"""

import argparse
import json
import sys

try:
    import numpy as np
    import onnxruntime
    from PIL import Image
except ImportError as error:
    sys.exit(f'error: {error}; pip install numpy pillow onnxruntime')


def detect(model, path):
    """Return boxes (K, 4) in pixels of the image, scores, labels, names of classes."""
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    about = json.loads(session.get_modelmeta().custom_metadata_map['mmgfp'])
    image = Image.open(path).convert('RGB')
    width, height = image.size
    if about['preprocess']:  # the file takes pixels as they are
        scaled, feed = (width, height), np.asarray(image)
        feed = feed[None] if about['channel_order'] == 'rgb' else feed[None, ..., ::-1]
    else:
        tall, wide = about['input_size']
        scaled = wide, tall
        if about['keep_ratio']:
            ratio = min(tall / height, wide / width)
            scaled = int(width * ratio + 0.5), int(height * ratio + 0.5)
        # Without antialiasing, as in OpenMMLab: an affine transform of scale alone.
        scale = (width / scaled[0], 0, 0, 0, height / scaled[1], 0)
        small = image.transform(scaled, Image.AFFINE, scale, Image.BILINEAR)
        pixels = np.asarray(small, np.float32)
        if (about['channel_order'] == 'rgb') == about['bgr_to_rgb']:
            pixels = pixels[..., ::-1]
        pixels = (pixels - np.float32(about['mean'])) / np.float32(about['std'])
        feed = np.zeros((tall, wide, 3), np.float32) + np.float32(about['pad_value'])
        feed[: scaled[1], : scaled[0]] = pixels
        feed = feed.transpose(2, 0, 1)[None]
    feed = np.ascontiguousarray(feed)
    dets, labels = session.run(['dets', 'labels'], {'image': feed})
    dets, labels = dets[0][labels[0] >= 0], labels[0][labels[0] >= 0]
    boxes = dets[:, :4] * np.tile([width / scaled[0], height / scaled[1]], 2)
    return boxes.clip(0, [width, height] * 2), dets[:, 4], labels, about['classes']


def main():
    """Print class, score and box of each detection."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', help='.onnx file of tools/export.py --nms')
    parser.add_argument('image')
    parser.add_argument('score', nargs='?', type=float, default=0.3, help='at least')
    args = parser.parse_args()
    try:
        boxes, scores, labels, classes = detect(args.model, args.image)
    except KeyError as error:
        sys.exit(f'error: {args.model} must hold {error}: tools/export.py writes it')
    except Exception as error:  # missing or damaged files, a model without --nms
        sys.exit(f'error: {" ".join(str(error).split())}')
    for box, score, label in zip(boxes, scores, labels, strict=True):
        if score >= args.score:
            name = classes[label] if classes else label
            print(f'{name} {score:.3f}', *(f'{side:.1f}' for side in box))


if __name__ == '__main__':
    main()
