"""cca.hf_mpi: a training step of small models of transformers over the ranks of mpirun is that of one process, which every
rank computes beside it."""

import contextlib
import inspect
import os
import pathlib
import re
import types

import pytest

if not {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(os.environ):
    pytest.skip("needs mpirun", allow_module_level=True)
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from mpi4py import MPI

import cca.hf
import cca.hf_mpi
import small_models
from small_models import CORES

torch.set_num_threads(1)
world = MPI.COMM_WORLD
ranks = cca.mpi.Ranks(world)
cca.hf.register()
cca.hf_mpi.register()

NAMES = ("llama", "gpt_oss", "mistral")
LENGTHS = [31, 50]
LAYOUTS = {
    "contiguous": cca.mpi.Layout.contiguous(ranks.size, LENGTHS),
    "head_to_tail": cca.mpi.Layout.head_to_tail(ranks.size, LENGTHS),
    "uneven": cca.mpi.Layout(
        ranks.size, LENGTHS,
        [(r, 0, r, r + 1) for r in range(ranks.size - 1)] + [(ranks.size - 1, 0, ranks.size - 1, 31), (ranks.size - 1, 1, 0, 50)],
    ),
}


def norm_in_double(self, x):
    """Of transformers they are in float."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def model_of(name, implementation, dtype=torch.float64):
    model = small_models.model_of(name, implementation, dtype)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and dtype == torch.float64:
            module.forward = types.MethodType(norm_in_double, module)
    return model.train()


def batch(lengths=LENGTHS):
    """Documents one after the other: ids, positions, and of each token the next one of its document."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    following[:, (torch.tensor(lengths).cumsum(0) - 1).clamp_min(0)] = -100
    return ids, positions, following


def step(model, ids, positions, following, count):
    """The loss, a share of the mean over `count` tokens, and its gradients."""
    logits = model(ids, position_ids=positions, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0], following[0], ignore_index=-100, reduction="sum") / count
    loss.backward()
    return loss.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def step_across(layout, model, whole):
    """The same over the ranks, added up."""
    mine = layout.places_of(ranks.rank)
    count = int((whole[2] >= 0).sum())
    with cca.hf_mpi.across(ranks, layout):
        loss, gradients = step(model, *(x[:, mine] for x in whole), count)
    for gradient in gradients.values():
        world.Allreduce(MPI.IN_PLACE, gradient.numpy())
    return world.allreduce(loss), gradients


def step_alone(model, whole):
    """The same of one process, document by document: not all models of transformers tell packed ones apart."""
    count, ends = int((whole[2] >= 0).sum()), torch.tensor(LENGTHS).cumsum(0).tolist()
    parts = [step(model, *(x[:, begin:end] for x in whole), count) for begin, end in zip([0, *ends], ends)]
    return sum(loss for loss, _ in parts), parts[-1][1]  # gradients are added up


def distance(a, b):
    return (a.double() - b.double()).square().mean().sqrt().item()


def expect_same(got, wanted, bound=1e-10):
    assert abs(got[0] - wanted[0]) < bound * abs(wanted[0])
    for name, gradient in wanted[1].items():
        assert gradient.abs().max() > 0 or "router" in name, name  # of one expert a token: nothing to choose
        assert distance(got[1][name], gradient) <= bound * gradient.abs().max(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, CORES], ids=["own", "cores"])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_that_of_one_process(name, settings, layout):
    # Experts of transformers have no doubles.
    dtype, bound = (torch.float32, 2e-5) if name == "gpt_oss" else (torch.float64, 1e-10)
    with cca.hf.settings(**settings):
        wanted = step_alone(model_of(name, "cca", dtype), batch())
        expect_same(step_across(LAYOUTS[layout], model_of(name, "cca_mpi", dtype), batch()), wanted, bound)


def test_floats_are_within_the_error_rule():
    """Of every weight's gradient the error is at most twice that of floats in one process, and rounding."""
    whole, epsilon = batch(), torch.finfo(torch.float32).eps
    with cca.hf.settings(**CORES):
        exact = step_alone(model_of("llama", "cca"), whole)
        alone = step_alone(model_of("llama", "cca", torch.float32), whole)
        across = step_across(LAYOUTS["head_to_tail"], model_of("llama", "cca_mpi", torch.float32), whole)
    assert abs(across[0] - exact[0]) <= 2 * abs(alone[0] - exact[0]) + epsilon * abs(exact[0])
    for name, gradient in exact[1].items():
        rounding = epsilon * gradient.square().mean().sqrt().item()
        assert distance(across[1][name], gradient) <= 2 * distance(alone[1][name], gradient) + rounding, name


def test_layers_that_are_computed_anew():
    def model(implementation):
        made = model_of("llama", implementation)
        made.gradient_checkpointing_enable({"use_reentrant": False})
        return made

    with cca.hf.settings(**CORES):
        wanted = step_alone(model("cca"), batch())
        expect_same(step_across(LAYOUTS["contiguous"], model("cca_mpi"), batch()), wanted)


def test_bidirectional_layers():
    layout, (ids, positions, _) = LAYOUTS["contiguous"], batch()
    model = model_of("llama", "cca_mpi").eval()
    model.config.is_causal = model.model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    mine = layout.places_of(ranks.rank)
    with torch.no_grad(), cca.hf_mpi.across(ranks, layout):
        got = model(ids[:, mine], position_ids=positions[:, mine], use_cache=False).logits
        # A later token on the last rank is seen by the first one of its document, and by no other document.
        ids[:, -1] = 3 + (ids[:, -1] - 2) % 94
        after = model(ids[:, mine], position_ids=positions[:, mine], use_cache=False).logits
    changed = (got != after).any(-1)[0]
    assert torch.equal(changed, torch.tensor(mine) >= LENGTHS[0])


@contextlib.contextmanager
def refused(match, rank=None, error=ValueError):
    """On one rank as said, on the others, who were told, with its rank; or on all."""
    with pytest.raises(error if rank in (None, ranks.rank) else ValueError, match=match) as caught:
        yield
    if rank not in (None, ranks.rank):
        assert f"rank {rank}: " in str(caught.value)


@torch.no_grad()
def test_refusals():
    layout, (ids, positions, _), last = LAYOUTS["contiguous"], batch(), ranks.size - 1
    mine, model = layout.places_of(ranks.rank), model_of("llama", "cca_mpi").eval()
    ids, positions, wrong = ids[:, mine], positions[:, mine], ranks.rank == last
    with pytest.raises(RuntimeError, match="wants `with cca.hf_mpi.across"):
        model(ids, position_ids=positions)
    with cca.hf_mpi.across(ranks, layout):
        before = model(ids, position_ids=positions).logits
        with refused("position_ids: got others than the layout's", last):
            model(ids, position_ids=positions + 1 if wrong else positions)
        with refused("position_ids: got others than the layout's"):
            model(ids)
        with refused("attention_mask: got padding", last):
            mask = torch.ones_like(ids)
            mask[:, :1] = int(not wrong)
            model(ids, position_ids=positions, attention_mask=mask)
        cache = transformers.DynamicCache(config=model.config)
        named = {"cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values": cache}
        assert torch.equal(model(ids, position_ids=positions, use_cache=True, **named).logits, before)
        with refused(f"cache: got {2 * len(mine)} tokens, wants none"):
            model(ids, position_ids=positions, use_cache=True, **named)
        with refused("key: got |query: got "):
            model(ids.expand(2, -1), position_ids=positions)
        if ranks.size > 1:
            with cca.hf.settings(**CORES | {"window": 5 if wrong else 4}):
                with refused("options.window: got 4 on one rank and 5 on another"):
                    model(ids, position_ids=positions)
        cca.hf_mpi.AttentionInterface.register("half_cca", cca.hf_mpi.attention_forward)
        model.config._attn_implementation = "half_cca"
        with refused(r"half_cca without its mask function, wants cca.hf_mpi.register\(\)"):
            model(ids, position_ids=positions)
        model.config._attn_implementation = "cca_mpi"
        assert torch.equal(model(ids, position_ids=positions).logits, before)  # nobody is out of step


def test_the_page_trains():
    """Its weights after a step are those of one process, by transformers' own loss."""
    page = pathlib.Path(__file__).parents[3] / "cmake" / "docs" / "cluster.md"
    (block,) = (x for x in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) if "hf_mpi" in x)
    names = {}
    exec(compile(block, "cluster.md", "exec"), names)
    torch.manual_seed(0)
    alone = transformers.AutoModelForCausalLM.from_config(names["config"], attn_implementation="cca")
    before = [p.detach().clone() for p in alone.parameters()]
    alone(names["ids"], labels=names["ids"]).loss.backward()
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    for was, p, q in zip(before, alone.parameters(), names["model"].parameters()):
        assert distance(p, q) <= 1e-5 * distance(p, was) + torch.finfo(p.dtype).eps * was.abs().max()
