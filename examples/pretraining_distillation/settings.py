"""What is swept: the design-space tables of arXiv 2410.16215, one factor at a time from its first configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FIRST_CUT = (0.95, 100)


@dataclass(frozen=True)
class Setting:
    """One student.

    name: of its folder. flags: of ``megakd train``, over student.yaml. cut: top-p and top-k of its store; None: it
    reads none. dense: the teacher runs beside it instead. paper: what the paper gained over LM alone with a cosine
    learning rate, in percent of the mean of eight benchmarks, for 1.9B; None where it has no such row.
    """

    name: str
    title: str
    flags: str = ""
    cut: tuple[float, int] | None = FIRST_CUT
    dense: bool = False
    paper: float | None = None


WSD_LR = "--lr-decay-style WSD"
ALONE = "--kd-alpha 0"
LM = Setting("lm", "LM alone", ALONE, cut=None, paper=0.0)
FIRST = Setting("first", "first configuration: top-0.95-100, NLL, τ 1, α 1, cosine LR", paper=1.6)

_P = {0.5: 2.1, 0.6: 1.6, 0.7: 2.1, 0.8: 1.9, 0.85: 1.3, 0.9: 1.3}
_K = {1: 1.9, 3: 1.1, 5: 2.7, 10: 2.1, 20: 1.3, 50: 5.0}
_TAU = {0.05: 1.6, 0.1: 2.1, 0.2: 2.5, 0.5: 2.7, 2.0: 2.5, 5.0: -0.1, 10.0: 1.0}
_ALPHA = {0.1: 0.1, 0.5: 1.5, 0.6: 1.4, 0.7: 2.9, 0.8: 2.0, 0.9: 3.6, 0.95: 2.5}
_ALPHA_WSD = "--kd-alpha-schedule wsd"

TABLES: Mapping[str, tuple[Setting, ...]] = {
    "p": tuple(Setting(f"p-{p:g}", f"top-p {p:g}, k 100", cut=(p, 100), paper=gain) for p, gain in _P.items()),
    "k": tuple(Setting(f"k-{k}", f"p 0.95, top-k {k}", cut=(0.95, k), paper=gain) for k, gain in _K.items()),
    "temperature": tuple(
        Setting(f"tau-{tau:g}", f"τ {tau:g}", f"--kd-temperature {tau:g}", paper=gain) for tau, gain in _TAU.items()
    ),
    "loss": (
        Setting("forward-kl", "forward KL", "--kd-divergence forward_kl", paper=2.6),
        Setting("ghost-kl", "forward KL, tail as one bucket", "--kd-divergence forward_kl --kd-tail ghost"),
        Setting("reverse-kl", "reverse KL, tail as one bucket", "--kd-divergence reverse_kl --kd-tail ghost"),
        Setting("jsd", "Jensen-Shannon", "--kd-divergence generalised_jsd"),
        Setting("dense-kl", "forward KL, the whole teacher", "--kd-divergence forward_kl", cut=None, dense=True),
        Setting("mse", "logit MSE, the whole teacher", "--kd-divergence logit_mse", cut=None, dense=True, paper=-7.6),
    ),
    "alpha": tuple(
        Setting(f"alpha-{alpha:g}", f"α {alpha:g}", f"--kd-alpha {alpha:g}", paper=gain)
        for alpha, gain in _ALPHA.items()
    ),
    "schedule": (
        Setting("lm-wsd", "LM alone, WSD LR", f"{ALONE} {WSD_LR}", cut=None, paper=1.2),
        Setting("up", "α rising in a line", "--kd-alpha-schedule linear_up", paper=1.1),
        Setting("down", "α falling in a line", "--kd-alpha-schedule linear_down", paper=4.1),
        Setting("periodic", "α periodic", "--kd-alpha-schedule periodic", paper=0.9),
        Setting("wsd-lr", "α 1, WSD LR", WSD_LR, paper=5.0),
        Setting("wsd-alpha", "WSD-α, cosine LR", _ALPHA_WSD, paper=2.3),
        Setting("wsd-beta-lr", "WSD-β, WSD LR", f"--kd-alpha-schedule wsd_beta {WSD_LR}", paper=1.1),
        Setting("wsd-alpha-lr", "WSD-α, WSD LR", f"{_ALPHA_WSD} {WSD_LR}", paper=8.0),
        Setting(
            "pd-star",
            "PD*: top-0.95-50, τ 2, forward KL, WSD-α to 0.9, WSD LR",
            f"--kd-divergence forward_kl --kd-temperature 2 --kd-alpha 0.9 {_ALPHA_WSD} {WSD_LR}",
            cut=(0.95, 50),
            paper=9.3,
        ),
    ),
}
