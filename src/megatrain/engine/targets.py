"""Which labels are targets: decides how much each micro-batch counts."""

from torch import Tensor, nn

from megatrain.model.head import IGNORED, shift_labels

_SHIFTING = ("ForCausalLM", "ForConditionalGeneration")  # names of transformers' losses


def count_targets(labels: Tensor, shifted: bool) -> int:
    """Labels that count in the loss; where the model shifts them, the first of each sequence is nobody's target."""
    return int(((shift_labels(labels) if shifted and labels.ndim > 1 else labels) != IGNORED).sum())


def target_mask(labels: Tensor, *, shifted: bool) -> Tensor:
    """Which labels count in the loss, where they stand."""
    mask = labels != IGNORED
    if shifted and labels.ndim > 1:
        mask[..., 0] = False
    return mask


def labels_are_shifted(model: nn.Module) -> bool:
    """Whether the model's loss takes a label as the target of the position before.

    transformers names the loss of its models. A module of one's own says so by an attribute `shifts_labels`; without
    it, labels are taken to follow transformers' language models, which shift.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    own = getattr(model, "shifts_labels", None)
    if isinstance(own, bool):
        return own
    name = getattr(model, "loss_type", None)
    if isinstance(name, str):
        return name in _SHIFTING
    embeddings = getattr(model, "get_output_embeddings", None)
    return embeddings is None or embeddings() is not None
