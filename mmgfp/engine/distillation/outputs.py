"""Outputs of a student and its teacher on the same images, and their distances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmgfp.engine.distillation.losses import sigmoid_divergence, softmax_divergence
from mmgfp.engine.distillation.maps import compare_maps
from mmgfp.utils.errors import ConfigError

#: Heads of MMPretrain that give logits, (N, K).
LOGIT_HEADS = (
    'ClsHead',
    'LinearClsHead',
    'MultiLabelLinearClsHead',
    'StackedLinearClsHead',
    'VisionTransformerClsHead',
)
#: Dense heads of MMDetection that give logits of classes, and what boxes are decoded
#: from. Others give probabilities, decoded boxes, or something else for each image.
MAP_HEADS = (
    'ATSSHead',
    'AnchorHead',
    'FCOSHead',
    'FSAFHead',
    'FreeAnchorRetinaHead',
    'GFLHead',
    'NASFCOSHead',
    'PAAHead',
    'PISARetinaHead',
    'PISASSDHead',
    'RPNHead',
    'RTMDetHead',
    'RTMDetSepBNHead',
    'RetinaHead',
    'RetinaSepBNHead',
    'SSDHead',
    'YOLOXHead',
)
REMEDY = 'give the unpruned model as teacher'


@dataclass(frozen=True)
class Call:
    """A call of one of the student's modules.

    Attributes:
        args: Its positional arguments.
        output: Its result.
    """

    args: Sequence[Any]
    output: Any


@dataclass
class Comparison:
    """How far a student is from its teacher on one batch.

    Attributes:
        terms: Distances of their outputs, scalars, by name.
        features: The features that the teacher's neck puts out, (N, C, H, W) each.
    """

    terms: dict[str, Tensor]
    features: list[Tensor] = field(default_factory=list)


class Subject(ABC):
    """The parts of one kind of model that are compared.

    Args:
        student: The model that trains.
        teacher: The unpruned model, in eval mode.
        temperature: Temperature of softmaxes.
        outputs: Whether outputs of heads are compared, and not features alone.

    Attributes:
        watched: Names of the student's modules whose calls are needed.
        left_out: Reasons why something is not compared.

    Raises:
        ConfigError: If the heads of the two do not go together.
    """

    watched: ClassVar[tuple[str, ...]]

    def __init__(
        self, student: Any, teacher: Any, temperature: float, outputs: bool = True
    ) -> None:
        self.student, self.teacher = student, teacher
        self.temperature, self.outputs = temperature, outputs
        self.left_out: list[str] = []

    @abstractmethod
    def compare(self, inputs: Tensor, calls: Mapping[str, Call]) -> Comparison:
        """Run the teacher on a batch and compare it with the student.

        Args:
            inputs: The images as the student got them, (N, C, H, W).
            calls: The student's calls, by the names in `watched`.

        Raises:
            ConfigError: If the outputs of the teacher have other shapes.
        """

    def _let_train(self, name: str) -> None:
        """Let the code of the teacher's head, but not its norms, do as in training.

        FCOS scales its boxes in training only; what is compared must be scaled alike.
        """
        self.teacher.get_submodule(name).training = True

    def _check_head(self, name: str, known: Sequence[str] = ()) -> None:
        """Refuse heads of two classes, or of other ones than those known.

        Raises:
            ConfigError: If the heads called ``name`` are.
        """
        ours, theirs = (m.get_submodule(name) for m in (self.student, self.teacher))
        kind = type(ours).__name__
        if known and kind not in known:
            raise ConfigError(
                f'{name} of the model',
                f'one of {", ".join(known)}',
                kind,
                'leave cls and bbox out by weights=dict(cls=0, bbox=0), or the hook',
            )
        check_alike(f"the teacher's {name}", kind, type(theirs).__name__)
        field = f"num_classes of the teacher's {name}"
        check_alike(field, *(getattr(h, 'num_classes', None) for h in (ours, theirs)))


class Classifier(Subject):
    """An image classifier: its logits."""

    watched = ('head',)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.outputs:
            raise ConfigError(
                'weights.cls', 'above 0 for a classifier', '0', 'leave it at 1'
            )
        self._check_head('head', LOGIT_HEADS)

    def compare(self, inputs: Tensor, calls: Mapping[str, Call]) -> Comparison:
        """Compare the predicted classes."""
        with torch.no_grad():
            theirs = self.teacher.head(self.teacher.extract_feat(inputs))
        loss = getattr(self.teacher.head, 'loss_module', None)
        ours = calls['head'].output
        return Comparison({'cls': _of_logits(loss, ours, theirs, self.temperature)})


class OneStageDetector(Subject):
    """A detector with a dense head: its maps of classes and boxes, its features."""

    watched = ('neck', 'bbox_head')

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.outputs:
            self._check_head('bbox_head', MAP_HEADS)
            self._let_train('bbox_head')

    def compare(self, inputs: Tensor, calls: Mapping[str, Call]) -> Comparison:
        """Compare the maps of the head."""
        head = self.teacher.bbox_head
        with torch.no_grad():
            features = self.teacher.extract_feat(inputs)
            if not self.outputs:
                return Comparison({}, list(features))
            theirs = head(features)
        ours = calls['bbox_head'].output
        terms = compare_maps(head, ours, theirs, self.temperature, self.left_out)
        return Comparison(terms, list(features))


class TwoStageDetector(Subject):
    """A detector with an RPN: its maps, what is predicted for RoIs, its features.

    The teacher looks at the student's RoIs, which are sampled at random.
    """

    watched = (
        'neck',
        'rpn_head',
        'roi_head.bbox_roi_extractor',
        'roi_head.bbox_head',
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_box_head = False
        if not self.outputs:
            return
        self._check_head('rpn_head', MAP_HEADS)
        self._let_train('rpn_head')
        roi_head = self.teacher.roi_head
        box_head = getattr(roi_head, 'bbox_head', None)
        if isinstance(box_head, nn.Module) and not isinstance(box_head, nn.ModuleList):
            self._check_head('roi_head.bbox_head')
            self._has_box_head = True
        else:
            self.left_out.append(
                f'the predictions of {type(roi_head).__name__} for RoIs are not '
                'compared: it has no single box head'
            )

    def compare(self, inputs: Tensor, calls: Mapping[str, Call]) -> Comparison:
        """Compare the maps of the RPN, and classes and boxes of RoIs."""
        head = self.teacher.rpn_head
        with torch.no_grad():
            features = self.teacher.extract_feat(inputs)
            if not self.outputs:
                return Comparison({}, list(features))
            theirs = head(features)
        ours = calls['rpn_head'].output
        terms = compare_maps(head, ours, theirs, self.temperature, self.left_out)
        named = {f'rpn_{name}': value for name, value in terms.items()}
        extractor = calls.get('roi_head.bbox_roi_extractor')
        if self._has_box_head and extractor is not None:
            with torch.no_grad():
                found = self.teacher.roi_head._bbox_forward(features, extractor.args[1])
            named |= self._of_rois(calls['roi_head.bbox_head'].output, found)
        return Comparison(named, list(features))

    def _of_rois(self, ours: Any, theirs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return distances of logits (R, K + 1) and deltas (R, 4 K) or (R, 4)."""
        (logits, boxes), box_head = ours, self.teacher.roi_head.bbox_head
        scores, deltas = theirs['cls_score'], theirs['bbox_pred']
        loss = getattr(box_head, 'loss_cls', None)
        terms = {'roi_cls': _of_logits(loss, logits, scores, self.temperature)}
        widths = (4, 4 * box_head.num_classes)
        if not isinstance(boxes, Tensor) or boxes.shape[1] not in widths:
            reason = f'boxes of {type(box_head).__name__} are not compared: no deltas'
            if reason not in self.left_out:
                self.left_out.append(reason)
            return terms
        check_alike('boxes of the teacher', shape(boxes), shape(deltas))
        weight = scores.float().softmax(-1)[:, :-1]  # (R, K)
        if boxes.shape[1] == 4:
            weight = weight.sum(1, keepdim=True)
        distance = (boxes.float() - deltas.float()).abs()
        distance = distance.unflatten(1, (-1, 4)).mean(-1)  # (R, K)
        terms['roi_bbox'] = (weight * distance).sum() / weight.sum().clamp(min=1)
        return terms


def subject_of(
    student: Any, teacher: Any, temperature: float, outputs: bool = True
) -> Subject:
    """Return what is compared in these models; see `Subject`.

    Raises:
        ConfigError: If the model is of no known kind, or the teacher of another.
    """
    kinds: dict[str, type[Any]] = {
        'rpn_head': TwoStageDetector,
        'bbox_head': OneStageDetector,
        'head': Classifier,
    }
    for name, kind in kinds.items():
        if isinstance(getattr(student, name, None), nn.Module):
            check_alike('teacher', type(student).__name__, type(teacher).__name__)
            return kind(student, teacher, temperature, outputs)
    raise ConfigError(
        'model',
        'a classifier of MMPretrain or a detector of MMDetection',
        type(student).__name__,
        'leave the DistillationHook out',
    )


def shape(output: Any) -> tuple[int, ...] | str:
    """Return the shape of a tensor; the type of anything else."""
    is_tensor = isinstance(output, Tensor)
    return tuple(output.shape) if is_tensor else type(output).__name__


def check_alike(field: str, expected: Any, got: Any) -> None:
    """Refuse a teacher that differs from the model in something.

    Raises:
        ConfigError: If it does.
    """
    if expected != got:
        raise ConfigError(field, f'as in the model, {expected}', str(got), REMEDY)


def _of_logits(loss: Any, ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence of logits (N, K) that go into ``loss``."""
    check_alike('logits of the teacher', shape(ours), shape(theirs))
    if getattr(loss, 'use_sigmoid', False):
        return sigmoid_divergence(ours, theirs).sum(-1).mean()
    return softmax_divergence(ours, theirs, temperature).mean()
