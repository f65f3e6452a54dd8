"""SMARTLoss inside torch.compile and CUDA graphs: one graph, eager's gradients, nothing read back by the host."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from smart_fast import SMARTLoss, js_loss, kl_loss, sentence_norm, sym_kl_loss
from smart_fast.backends import select
from smart_fast.norms import inf_norm, l1_norm, l2_norm
from tests.helpers import exhaustively

SETTINGS = {"step_size": 10.0, "noise_var": 0.1}  # so that the ascent matters


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    assert not torch._dynamo.config.trace_autograd_ops  # ours for the call only


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request):
    if (
        request.param != "torch"
        and select("auto" if request.param == "native" else "triton", torch.zeros(1, 1)).name == "torch"
    ):
        pytest.skip(f"{request.param} does not run on CPU tensors here")
    return request.param


def classifier(**options):
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


class TinyLM(nn.Module):
    """Causal attention from embeddings ``[B, S, 8]`` to logits over 11 words."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(self.norm(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)))


MODELS = {"classifier": (classifier, (5, 8)), "lm": (TinyLM, (2, 7, 8))}


def gradients(run, inputs, seed=1):
    """The loss and its gradients, always from the same noise."""
    torch.manual_seed(seed)
    for each in inputs:
        each.grad = None
    loss = run()
    loss.backward()
    return [loss.detach(), *[each.grad for each in inputs]]


def check(call, inputs, compiler="aot_eager", graphs=1, tolerance=1e-5, **options):
    """One graph, whose loss and gradients are eager's."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(call, fullgraph=True, backend=counter, **options)
    with torch._inductor.config.patch(fallback_random=True):  # the noise of backend "torch" is torch's
        found = gradients(compiled, inputs)
    torch.testing.assert_close(found, gradients(call, inputs), rtol=tolerance, atol=tolerance / 10)
    assert counter.frame_count == graphs
    return found


@pytest.mark.parametrize("requires_grad", [True, *exhaustively(False)])
@pytest.mark.parametrize(
    ("model", "num_steps"), [("lm", 2), *exhaustively(("classifier", 0), ("classifier", 1), ("classifier", 3))]
)
def test_one_graph(model, num_steps, requires_grad, backend):
    """Compiled alone, with an embedding and a state from outside."""
    make, shape = MODELS[model]
    net, table = make(), torch.randn(shape, requires_grad=requires_grad)
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, num_steps=num_steps, backend=backend, **SETTINGS)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(smart, fullgraph=True, backend=counter)
    inputs = [*net.parameters()] + [table] * requires_grad

    def run(regularizer):
        embed = table * 1.0  # no leaf: as layers below would make it
        state = net(embed)
        state.retain_grad()
        loss = regularizer(embed, state)
        run.state = state
        return loss

    found, expected = [], []
    for regularizer, results in ((compiled, found), (smart, expected)):
        results += gradients(lambda regularizer=regularizer: run(regularizer), inputs)
        results.append(run.state.grad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_steps", [2, *exhaustively(0)])
def test_inductor(num_steps, backend):
    net, embed = classifier(), torch.randn(5, 8, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, num_steps=num_steps, backend=backend, **SETTINGS)
    check(lambda: smart(embed, net(embed)), [embed, *net.parameters()], "inductor")


@pytest.mark.exhaustive
@pytest.mark.parametrize("norm", [inf_norm, l1_norm, sentence_norm(l1_norm), lambda x: x.abs().amax()])
def test_paper_and_relative(norm, backend):
    net, embed = classifier(), torch.randn(5, 8, requires_grad=True)
    smart = SMARTLoss(
        net, kl_loss, sym_kl_loss, norm, 2, 1.0, 0.3, 0.1, update="paper", scale="relative", backend=backend
    )
    check(lambda: smart(embed, net(embed)), [embed, *net.parameters()])


@pytest.mark.exhaustive
def test_a_whole_step_compiles_with_inductor():
    net, table, ids = Head(), nn.Embedding(11, 8), torch.randint(3, (2, 7))
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, backend="auto", **SETTINGS)

    def step():
        embed = table(ids)
        state = net(embed)
        return F.cross_entropy(state.flatten(0, 1), ids.flatten()) + 0.1 * smart(embed, state)

    check(step, [table.weight, *net.parameters()], "inductor")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("num_steps", "requires_grad"), [(1, True), (2, False)])
def test_under_autocast(num_steps, requires_grad, backend):
    """The ascent casts weights for itself: those of autocast's cache belong to a graph that it would use up."""
    net, embed = classifier(), torch.randn(5, 8, requires_grad=requires_grad)
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, num_steps=num_steps, backend=backend, **SETTINGS)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return smart(embed, net(embed))

    check(call, [*net.parameters()] + [embed] * requires_grad, tolerance=1e-2)


@pytest.mark.exhaustive
def test_batches_of_any_size(backend):
    net = classifier()
    smart = SMARTLoss(net, kl_loss, backend=backend, **SETTINGS)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(smart, fullgraph=True, backend=counter, dynamic=True)
    seen = []
    for size in (4, 7, 9, 16):
        embed = torch.randn(size, 8, requires_grad=True)
        found, expected = (gradients(lambda r=r, x=embed: r(x, net(x)), [embed]) for r in (compiled, smart))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        seen.append(counter.frame_count)
    assert seen[0] == seen[-1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["noise_var", "step_size", "epsilon", "num_steps"])
def test_settings_may_change_between_calls(name, backend):
    net, embed = classifier(), torch.randn(5, 8, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, backend=backend, **SETTINGS)
    compiled = torch.compile(smart, fullgraph=True, backend="aot_eager")
    for value in (1, 2, 3):
        setattr(smart, name, value if name == "num_steps" else value / 4)
        results = [gradients(lambda r=r: r(embed, net(embed)), [embed]) for r in (compiled, smart)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(checkpoint(lambda x: self.body(x).tanh(), x, use_reentrant=False))


def normalized():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3)), {}),
        (Checkpointed, {}),
        (normalized, {}),
        (normalized, {"freeze_batch_norm": True, "ascent_dropout": False}),
        (classifier, {"norm_fn": sentence_norm(l2_norm), "update": "sift"}),
        (classifier, {"loss_scale": 2.0**16}),
        (classifier, {"loss_scale": torch.amp.GradScaler("cpu")}),
    ],
    ids=["in place", "checkpoint", "BatchNorm and dropout", "neither", "norms", "loss_scale", "GradScaler"],
)
def test_what_eager_does(make, options):
    net, embed = make(), torch.randn(5, 8, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, num_steps=2, backend="torch", **SETTINGS, **options)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    ends = []

    def call():
        return smart(embed * 1.0, net(embed * 1.0))

    def restarted():  # running statistics are part of the result
        net.load_state_dict(start)
        return call()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, call):
        net.load_state_dict(start)
        results.append(gradients(run, [embed, *net.parameters()]))
        ends.append({name: value.clone() for name, value in net.state_dict().items()})
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*ends)
    assert net.training
    assert all(each.training for each in net.modules())


def test_masks_tuples_and_several_states():
    net, left, right = nn.Linear(8, 3), torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])

    def eval_fn(x, y):
        return {"logits": net(x * y), "other": net(x)}

    smart = SMARTLoss(eval_fn, {"logits": kl_loss, "other": js_loss}, num_steps=2, **SETTINGS)
    check(lambda: smart((left, right), eval_fn(left, right), mask=(mask, None)), [left, right, *net.parameters()])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    net, embed = classifier(), torch.randn(5, 8)
    smart = SMARTLoss(net, kl_loss, num_steps=2, backend="torch", **SETTINGS)
    compiled = torch.compile(smart, fullgraph=mode is torch.no_grad, backend="aot_eager")
    with mode():
        found = []
        for each in (compiled, smart):
            torch.manual_seed(1)
            found.append(each(embed, net(embed)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
def test_eval_fn_may_break_the_graph_where_that_is_allowed():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            hidden = self.body(x).tanh()
            torch._dynamo.graph_break()
            return self.head(hidden)

    net, embed = Breaks(), torch.randn(5, 8, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, num_steps=2, backend="torch", **SETTINGS)
    compiled = torch.compile(smart, backend="aot_eager")
    found = [gradients(lambda r=r: r(embed, net(embed)), [embed, *net.parameters()]) for r in (compiled, smart)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", [{"every_n_steps": 2}, {"start_step": 1}])
def test_counting_steps_is_refused(option):
    net, embed = classifier(), torch.randn(5, 8)
    smart = SMARTLoss(net, kl_loss, backend="torch", **option)
    with pytest.raises(Exception, match="every_n_steps and start_step do not work"):
        torch.compile(smart, backend="eager", fullgraph=True)(embed, net(embed))


# A compiled eval_fn in an eager SMARTLoss


class Backwards:
    """A compiler backend that notes how many gradients each backward graph it runs computes."""

    def __init__(self):
        self.ran = []

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def forward(graph, inputs):
            return make_boxed_func(graph.forward)

        def backward(graph, inputs):
            outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
            wanted = sum(each is not None for each in outputs)

            def run(*args):
                self.ran.append(wanted)
                return graph.forward(*args)

            return make_boxed_func(run)

        return aot_autograd(fw_compiler=forward, bw_compiler=backward)(graph, inputs)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x).tanh())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("freeze", [None, True, False])
def test_a_compiled_eval_fn_computes_no_weight_gradients_in_the_ascent(freeze, in_place):
    net, embed = Head(), torch.randn(5, 8, requires_grad=True)
    state, counting = net(embed).detach(), Backwards()
    net.body.bias.requires_grad_(False)
    expected = gradients(
        lambda: SMARTLoss(net, kl_loss, num_steps=2, **SETTINGS)(embed, state), [embed, net.head.weight]
    )
    if in_place:
        net.compile(backend=counting)
    smart = SMARTLoss(net if in_place else torch.compile(net, backend=counting), kl_loss, num_steps=2, **SETTINGS)
    smart.freeze_parameters = freeze
    found = gradients(lambda: smart(embed, state), [embed, net.head.weight])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert counting.ran == ([4, 4, 4] if freeze is False else [1, 1, 4])
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == ["body.bias"]


def test_parameters_thaw_after_an_error():
    class Fails(nn.Linear):
        def forward(self, x):
            assert not self.weight.requires_grad
            raise KeyError("of the user")

    net, embed = Fails(8, 3), torch.randn(5, 8)
    with pytest.raises(KeyError, match="of the user"):
        SMARTLoss(net, kl_loss, freeze_parameters=True)(embed, torch.zeros(5, 3))
    assert all(each.requires_grad for each in net.parameters())


def test_plain_modules_are_not_frozen_unless_asked():
    net, embed, seen = nn.Linear(8, 3), torch.randn(5, 8), []
    net.register_forward_hook(lambda *_: seen.append(net.weight.requires_grad))
    state = net(embed).detach()
    for freeze in (None, True):
        seen.clear()
        SMARTLoss(net, kl_loss, freeze_parameters=freeze)(embed, state)
        assert seen == [freeze is None, True]


# Nothing is read back by the host


class NoReads(TorchDispatchMode):
    """Fails on what would synchronize a GPU: a tensor that becomes a number, or decides a shape."""

    BAD = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.BAD, f"{func} synchronizes"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("update", ["paper", *exhaustively("smart-pytorch", "sift")])
@pytest.mark.parametrize(
    "norm",
    [None, sentence_norm(l2_norm), sentence_norm(l1_norm), lambda x: x.abs().amax()],
    ids=["inf", "sentence", "l1", "own"],
)
def test_triton_reads_nothing_back(norm, update):
    if select("triton", torch.zeros(1, 1)).name == "torch":
        pytest.skip("Triton kernels do not run on CPU tensors here")
    net, embed = classifier(), torch.randn(5, 8, requires_grad=True)
    options = {} if norm is None else {"norm_fn": norm}
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    smart = SMARTLoss(
        net, kl_loss, sym_kl_loss, num_steps=2, update=update, backend="triton", loss_scale=scaler, **options
    )
    mask = torch.tensor([True, True, False, True, True])
    with NoReads():
        smart(embed, net(embed), mask=mask).backward()
    assert embed.grad.isfinite().all()


@pytest.fixture
def no_sync():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(num_steps=2, **options):
    net = classifier().cuda()
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, num_steps=num_steps, backend="triton", **SETTINGS, **options)
    return net, smart, torch.randn(5, 8, device="cuda", requires_grad=True)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_no_synchronization(autocast, no_sync):
    net, smart, embed = on_gpu(loss_scale=torch.amp.GradScaler("cuda"))
    smart.loss_scale.scale(torch.ones((), device="cuda"))
    with torch.autocast("cuda", torch.float16, enabled=autocast):
        smart(embed, net(embed)).backward()


@pytest.mark.gpu
def test_a_cuda_graph_draws_fresh_noise():
    net, smart, embed = on_gpu()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            smart(embed, net(embed)).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    embed.grad = None
    with torch.cuda.graph(graph):
        loss = smart(embed, net(embed))
        loss.backward()
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(loss.item())
        assert embed.grad.isfinite().all()
    assert len(set(losses)) == 3


@pytest.mark.gpu
def test_make_graphed_callables():
    net, smart, embed = on_gpu()
    state = net(embed).detach().requires_grad_()
    graphed = torch.cuda.make_graphed_callables(smart, (embed, state))
    losses = [graphed(embed, state) for _ in range(2)]
    losses[-1].backward()
    assert embed.grad.isfinite().all()
    assert not torch.equal(*losses)


@pytest.mark.gpu
def test_reduce_overhead():
    net, smart, embed = on_gpu()
    compiled = torch.compile(lambda x: smart(x, net(x)), fullgraph=True, mode="reduce-overhead")
    losses = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(embed)
        loss.backward()
        losses.append(loss.item())
    assert len(set(losses)) == 4


@pytest.mark.gpu
def test_compiled_gradients_on_a_gpu():
    net, smart, embed = on_gpu()
    check(lambda: smart(embed, net(embed)), [embed, *net.parameters()], "inductor")
