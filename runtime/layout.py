"""How a layer's heads are laid out at run time: retained KV groups first, retrieval heads first inside each."""

from dataclasses import dataclass, replace
from typing import Literal

from rtpurbo.manifests.manifest import LayerRoles, Manifest

Roles = Literal["manifest", "all-local", "all-retrieval"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Retained KV groups start ... stop-1 (run-time order), each with `num_retrieval` retrieval heads in front."""

    start: int
    stop: int
    num_retrieval: int


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """The run-time head order of one layer.

    group_order[new] and head_order[new] are the checkpoint's KV group and query head. retrieval_counts: retrieval heads of
    each retained group, descending, so that retained groups fall into few runs. index_q_rows and index_k_rows reorder the
    tensors of indexer.safetensors; key_sets[n] is the (reordered) row of index_k that the n-th retrieval head reads, and
    key_groups[i] the run-time KV group that row i projects.
    """

    group_size: int
    group_order: tuple[int, ...]
    head_order: tuple[int, ...]
    retrieval_counts: tuple[int, ...]
    index_q_rows: tuple[int, ...]
    index_k_rows: tuple[int, ...]
    key_sets: tuple[int, ...]
    key_groups: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        """KV groups of the layer."""
        return len(self.group_order)

    @property
    def num_retained(self) -> int:
        """KV groups that keep their full cache: run-time groups 0 ... num_retained-1."""
        return len(self.retrieval_counts)

    @property
    def retrieval_heads(self) -> tuple[int, ...]:
        """Run-time query heads that retrieve, ascending."""
        return tuple(g * self.group_size + j for g, count in enumerate(self.retrieval_counts) for j in range(count))

    @property
    def runs(self) -> tuple[Run, ...]:
        """The retained groups as runs of equal retrieval counts."""
        runs: list[Run] = []
        for g, count in enumerate(self.retrieval_counts):
            if runs and runs[-1].num_retrieval == count:
                runs[-1] = replace(runs[-1], stop=g + 1)
            else:
                runs.append(Run(start=g, stop=g + 1, num_retrieval=count))
        return tuple(runs)


def with_roles(manifest: Manifest, roles: Roles, top_p: float | None) -> Manifest:
    """The manifest as it will run: roles replaced by an ablation's, top_p by the caller's.

    all-local: no head retrieves. all-retrieval: every head does, which needs an index projection for every head unless top_p
    is 1 (then decode is dense). Raises ValueError when that does not hold, or for unknown roles or a top_p outside (0, 1].
    """
    if roles not in ("manifest", "all-local", "all-retrieval"):
        raise ValueError(f"roles is {roles!r}, wanted manifest, all-local or all-retrieval")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, wanted 0 < top_p <= 1")
    top_p = manifest.top_p if top_p is None else top_p
    shape = manifest.model
    layers = manifest.layers
    if roles == "all-local":
        layers = tuple(LayerRoles(scores=layer.scores, retrieval_heads=(), retained_groups=()) for layer in layers)
    elif roles == "all-retrieval":
        heads, groups = tuple(range(shape.num_attention_heads)), tuple(range(shape.num_key_value_heads))
        layers = tuple(LayerRoles(scores=layer.scores, retrieval_heads=heads, retained_groups=groups) for layer in layers)
        if top_p < 1 and layers != manifest.layers:
            raise ValueError(
                f"roles all-retrieval with top_p {top_p} needs an index projection for every head, but the manifest has "
                f"{manifest.num_retrieval_heads} of {shape.num_hidden_layers * shape.num_attention_heads}; use top_p 1"
            )
    return replace(manifest, layers=layers, top_p=top_p)


def layout_of(manifest: Manifest, layer: int) -> LayerLayout:
    """The run-time layout of a layer: groups with most retrieval heads first (ties by id), local groups last."""
    group_size, roles = manifest.model.group_size, manifest.layers[layer]
    in_group = {g: [h for h in roles.retrieval_heads if h // group_size == g] for g in roles.retained_groups}
    retained = sorted(in_group, key=lambda g: (-len(in_group[g]), g))
    group_order = (*retained, *(g for g in range(manifest.model.num_key_value_heads) if g not in in_group))
    head_order: list[int] = []
    for g in group_order:
        group = range(g * group_size, (g + 1) * group_size)
        head_order += sorted(group, key=lambda h: h not in roles.retrieval_heads)
    heads = [h for g in retained for h in in_group[g]]
    head_row = tuple(roles.retrieval_heads.index(h) for h in heads)
    place_of_group = {g: place for place, g in enumerate(retained)}
    groups_of_heads = tuple(place_of_group[h // group_size] for h in heads)
    by_head = manifest.indexer.keys == "head"
    return LayerLayout(
        group_size=group_size,
        group_order=group_order,
        head_order=tuple(head_order),
        retrieval_counts=tuple(len(in_group[g]) for g in retained),
        index_q_rows=head_row,
        index_k_rows=head_row if by_head else tuple(roles.retained_groups.index(g) for g in retained),
        key_sets=tuple(range(len(heads))) if by_head else groups_of_heads,
        key_groups=groups_of_heads if by_head else tuple(range(len(retained))),
    )
