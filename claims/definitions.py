"""The claims: what a paper states, the runs that test it, and the rule by which it holds.

A run is a command line of train.py without its seed and folder, or of evaluate.py; "then" joins
those that depend on each other (`results.make`). Every claim compares *arms*; the best command line
of an arm, such as that of the best learning rate, represents it (`results.best`).
"""

from dataclasses import dataclass

ANY = "hallucination/any"
METHODS = {
    "SFT": "--algo sft",
    "DPO": "--algo dpo",
    "DDPO, the paper's loss": "--algo ddpo --anchor 0 --beta 0.5",
    "DDPO + anchor": "--algo ddpo --anchor 16 --beta 5",
}
RATES = {  # three per method, around the best of a first search
    "SFT": ("1e-4", "3e-4", "1e-3"), "DPO": ("1e-5", "3e-5", "1e-4"),
    "DDPO, the paper's loss": ("1e-5", "3e-5", "1e-4"),
    "DDPO + anchor": ("1e-4", "3e-4", "1e-3"),
}
BEST = {  # the two best of these with complete corrections
    "SFT": ("3e-4", "1e-3"), "DPO": ("1e-5", "3e-5"), "DDPO, the paper's loss": ("1e-5", "3e-5"),
    "DDPO + anchor": ("3e-4", "1e-3"),
}
FEW = BEST | {"DPO": ("3e-5", "1e-4"), "DDPO, the paper's loss": ("3e-5", "1e-4")}
DEFAULT = f"{METHODS['DDPO + anchor']} --learning_rate 3e-4"


@dataclass(frozen=True)
class Claim:
    """A statement and its test.

    It holds for a pair (better, worse) of arms if the 95 % interval of the difference in `measure`
    over seeds lies below 0 (above `margin` if `higher`) and the better arm's coverage is at most
    one point lower. It fails if the interval lies on the other side, unless the worse arm loses
    more than a point of coverage. Otherwise these seeds do not decide.
    """

    name: str
    statement: str
    source: str
    arms: dict[str, tuple[str, ...]]  # label: command lines; the best one counts
    pairs: tuple[tuple[str, str], ...]  # (better, worse), by label
    measure: str = ANY
    note: str = ""
    higher: bool = False  # more of the measure is better
    margin: float = 0.0  # the least difference, if `higher`
    curves: tuple[str, ...] = ()  # logged metrics to draw against the KL to the reference


def methods(rates: dict[str, tuple[str, ...]], more: str = "") -> dict[str, tuple[str, ...]]:
    """Return an arm per method, at these learning rates."""
    return {name: tuple(f"{line} --learning_rate {rate}{more}" for rate in rates[name])
            for name, line in METHODS.items()}


def arms(options: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return arms of DDPO without anchor, at 3e-5.

    Args:
        options: by label; without a beta, it is the paper's.
    """
    beta = {label: "" if "--beta" in more else " --beta 0.5" for label, more in options.items()}
    line = "--algo ddpo --anchor 0{} --learning_rate 3e-5 {}"
    return {label: (line.format(beta[label], more).strip(),) for label, more in options.items()}


PAIRS = (("DDPO, the paper's loss", "DPO"), ("DDPO + anchor", "DDPO, the paper's loss"),
         ("DDPO + anchor", "SFT"))
CONDITIONS = {"": "", ", overlooked": " --overlook 0.3", ", few": " --corrections 200"}
COUNTS = (50, 200, 400, 800, 1400, 2200, 5000)
SCALING = {f"{count} corrections":
           methods(BEST, f" --corrections {count}" * (count != 1400))["DDPO + anchor"]
           for count in COUNTS}
RANKINGS = {f"{count} rankings": (f"{METHODS['DPO']} --feedback rankings --corrections {count} "
                                  "--learning_rate 3e-5",) for count in COUNTS}


def passes(epochs: str, *rates: str) -> tuple[str, ...]:
    """Return DDPO with an anchor where spans are overlooked, at these learning rates."""
    return tuple(f"--algo ddpo{epochs} --anchor 16 --beta 5 --learning_rate {rate} --overlook 0.3"
                 for rate in rates)


def staged(stage: str) -> str:
    """Return DDPO on the base after a supervised stage."""
    return (f"--algo sft --feedback {stage} --learning_rate 1e-4 then "
            f"{DEFAULT} --model {{here}}/model")


def rewarded(algo: str, facts: bool = True) -> str:
    """Return an algorithm on rewards, after training the reward model."""
    given = " --facts" if facts else ""
    return f"--algo rm{given} then --algo {algo}{given} --reward_model {{here}}"


PPO, PPO_ONCE = rewarded("ppo"), rewarded("ppo --epochs 1")
BEST_OF = "--algo rm --facts then evaluate.py world/base --best_of 8 --reward_model {here}"
ONLINE = "online_ddpo --anchor 16 --beta 0.5 --feedback reward_model"

CLAIMS = {claim.name: claim for claim in (
    Claim("methods", "DDPO beats DPO on the same corrections, and plain imitation of the corrected "
          "answers, too.", "RLHF-V, Table 3", methods(RATES), PAIRS,
          note="Each method at the best of three learning rates; 1,400 complete corrections."),
    Claim("overlooked", "The same, where the annotator overlooks 30 % of the false spans.",
          "RLHF-V, Section 3.1 (corrections by people)", methods(BEST, " --overlook 0.3"), PAIRS,
          note="SFT gains from the larger rate; with 3e-4 for both, DDPO is further ahead."),
    Claim("noisy", "The same, where 10 % of the corrections make a true statement false.",
          "RLHF-V, Section 3.1 (corrections by people)", methods(BEST, " --noise 0.1"), PAIRS),
    Claim("few", "The same, with 200 corrections.", "RLHF-V, Figure 2",
          methods(FEW, " --corrections 200"), PAIRS,
          note="These are only 19 steps, so SFT and DDPO leave half as much at the larger of their "
          "two rates as at 3e-4. DPO and the paper's loss hardly move at 3e-5; at 1e-4 they do and "
          "cost more than two points of coverage."),
    Claim("anchor", "The likelihood term needs a large weight, and beta must let the sigmoid "
          "saturate.", "ours",
          {f"anchor {weight}, beta {beta}{label}":
           (f"--algo ddpo --anchor {weight} --beta {beta} --learning_rate 3e-4{more}",)
           for label, more in CONDITIONS.items() for weight, beta in ((16, 5), (16, 0.5), (4, 5))},
          tuple((f"anchor 16, beta 5{label}", f"anchor {weight}, beta {beta}{label}")
                for label in CONDITIONS for weight, beta in ((16, 0.5), (4, 5))),
          note="With complete corrections, where 30 % of the false spans are overlooked, and with "
          "200 corrections (few), all at 3e-4."),
    Claim("passes", "Seven passes over the corrections, as in the paper, are better than three, "
          "the default here.", "RLHF-V, Section 4.1",
          {"two passes": passes(" --epochs 2", "3e-4", "5e-4"), "three passes": passes("", "3e-4"),
           "seven passes": passes(" --epochs 7", "3e-4")},
          (("seven passes", "three passes"), ("three passes", "two passes")),
          note="Where 30 % of the false spans are overlooked."),
    Claim("scaling", "200 corrections do what 2,200 rankings do, and more corrections do more.",
          "RLHF-V, Figure 2", SCALING | RANKINGS,
          (("200 corrections", "2200 rankings"), ("1400 corrections", "200 corrections"),
           ("5000 corrections", "1400 corrections")),
          note="The rankings compare two sampled answers of the same base; DPO learns from them."),
    Claim("gamma", "Corrected segments should weigh more: gamma 5 beats gamma 1.",
          "RLHF-V, Section 3.2", arms(
              {f"gamma {g}": f"--gamma {g}" * (g != 5) for g in (1, 2, 5, 10)}
              | {"gamma 5, sum": "--no-normalize --beta 0.1"})
          | {"gamma 1, sum": (f"{METHODS['DPO']} --learning_rate 3e-5",)},
          (("gamma 5", "gamma 1"), ("gamma 10", "gamma 5"), ("gamma 5, sum", "gamma 1, sum")),
          note="Means with beta 0.5, and the released code's form, sums with beta 0.1."),
    Claim("score", "A response's score is a mean over its tokens, with beta 0.5.",
          "RLHF-V, Eq. 5, against its released code",
          arms({"mean, beta 0.5": "", "mean, beta 0.1": "--beta 0.1", "mean, beta 5": "--beta 5",
                "sum, beta 0.5": "--no-normalize",
                "sum, beta 0.1": "--no-normalize --beta 0.1",
                "mean, beta 0.5, replacements only": "--replacements_only"}),
          (("mean, beta 0.5", "sum, beta 0.1"), ("mean, beta 5", "mean, beta 0.5"),
           ("mean, beta 0.5", "mean, beta 0.5, replacements only")),
          note="Means differ by little. So with beta 0.5 the margins (rewards/margins in "
          "metrics.jsonl) end near 0.25 and every pair pushes at nearly full strength to the end."),
    Claim("lora", "LoRA, at its own learning rate, does as well as training all weights.",
          "ours", {"all weights": methods(BEST)["DDPO + anchor"],
                   "LoRA": tuple(f"{METHODS['DDPO + anchor']} --lora 16 --learning_rate {rate}"
                                 for rate in ("1e-3", "3e-3")),
                   "SFT, LoRA": ("--algo sft --lora 16 --learning_rate 3e-3",)},
          (("LoRA", "base"), ("LoRA", "all weights"), ("LoRA", "SFT, LoRA")),
          note="Rank 16."),
    Claim("over_generalisation", "DDPO lowers over-generalisation, the extra mentions of an absent "
          "object in its typical setting.", "RLHF-V, Table 2", methods(BEST),
          (("DDPO + anchor", "base"), ("DDPO, the paper's loss", "base")), "over_generalisation"),
    Claim("vqa", "After instruction tuning on human-labelled short questions and answers, DDPO "
          "leaves fewer hallucinations.", "RLHF-V, Section 3.3 and Table 3",
          {"DDPO": (DEFAULT,), "questions, DDPO": (staged("questions"),)},
          (("questions, DDPO", "DDPO"),)),
    Claim("crops", "Random crops of the picture with unchanged text teach hallucination.",
          "RLHF-V, Section 3.3 and Table 3",
          {"descriptions, DDPO": (staged("descriptions"),),
           "cropped, DDPO": (staged("cropped"),)},
          (("descriptions, DDPO", "cropped, DDPO"),)),
    Claim("reward_model", "A reward model that is given facts agrees with more rankings, by at "
          "least ten points.", "LLaVA-RLHF, Section 2.3",
          {"with facts": ("--algo rm --facts",), "without facts": ("--algo rm",)},
          (("with facts", "without facts"),), "agreement", higher=True, margin=0.1,
          note="Agreement with 500 noiseless held-out pairs."),
    Claim("ppo", "PPO lowers hallucination, and more with facts given to the reward model.",
          "LLaVA-RLHF, Table 3",
          {"with facts": (PPO,), "with facts, one pass": (PPO_ONCE,),
           "without facts": (rewarded("ppo --epochs 1", False),),
           "with facts, KL 0.1": (rewarded("ppo --epochs 1 --kl_coef 0.1"),),
           "without facts, KL 0.1": (rewarded("ppo --epochs 1 --kl_coef 0.1", False),)},
          (("with facts", "base"), ("with facts", "with facts, one pass"),
           ("without facts", "base"), ("with facts, one pass", "without facts"),
           ("with facts, one pass", "with facts, KL 0.1"),
           ("with facts, KL 0.1", "without facts, KL 0.1")),
          note="All but the first make one pass over the prompts; two are the default. An answer "
          "that names nothing has nothing false: read coverage beside it."),
    Claim("hacking", "Four times as many steps on the same reward model leave fewer "
          "hallucinations, not more: the reward is not hacked.", "LLaVA-RLHF, Section 2.3",
          {"PPO, one pass": (PPO_ONCE,), "PPO, two passes": (PPO,), "PPO, four passes":
           (f"{PPO} --epochs 4 --held_out_reward_model {{next}}",)},
          (("PPO, four passes", "PPO, one pass"), ("PPO, four passes", "PPO, two passes")),
          curves=("truth/hallucination", "score/rm", "score/held_out"),
          note="The held-out reward model, of the next seed, is only monitored."),
    Claim("length", "Answers grow without a length penalty, but not with one.",
          "LLaVA-RLHF, Section 2.3",
          {"no penalty": (f"{PPO_ONCE} --length_penalty 0",),
           "the release's": (PPO_ONCE,),
           "10 per 128 tokens": (f"{PPO_ONCE} --length_penalty_tokens 128",)},
          (("10 per 128 tokens", "no penalty"), ("the release's", "no penalty")), "length",
          note="The release's is 10 per 896 tokens; descriptions have a twentieth as many."),
    Claim("baseline", "The mean return of the sibling completions is as good a baseline as a "
          "critic.", "RLOO, arXiv 2402.14740",
          {"group": (PPO_ONCE,), "critic": (f"{PPO_ONCE} --baseline critic",)},
          (("group", "critic"),)),
    Claim("algorithms", "With the same reward model, prompts and completions: which algorithm "
          "makes the most of them?", "ours",
          {"PPO": (PPO_ONCE,), "GRPO": (rewarded("grpo --epochs 1"),),
           "GRPO, no KL": (rewarded("grpo --epochs 1 --kl_coef 0"),),
           "online DDPO": (rewarded(ONLINE),),
           "offline DDPO": (rewarded(f"{ONLINE} --rounds 1"),),
           "best of 8": (BEST_OF,),
           "DDPO, 4000 corrections":
           ("--algo ddpo --anchor 16 --beta 0.5 --learning_rate 3e-4 --corrections 4000",)},
          (("PPO", "GRPO"), ("GRPO, no KL", "GRPO"), ("online DDPO", "offline DDPO"),
           ("online DDPO", "PPO"), ("PPO", "best of 8"), ("DDPO, 4000 corrections", "PPO")),
          curves=("truth/hallucination", "score/rm"),
          note="All learn from 4,000 annotations: rankings, or corrections in the last arm. Those "
          "trained on rewards have 2,000 prompts with four completions each, once, so nearly equal "
          "compute. Best of 8 trains no policy; it costs compute at answering time. DDPO's beta is "
          "0.5 here."),
)}
