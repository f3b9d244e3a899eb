"""Each benchmark's own prompt: the whole text of the user turn, as the benchmark or its harness has published it.

Instructions are quoted letter for letter, so their language is theirs; the source stands beside each. The pictures of a
problem stay where its markers are, and options are listed as `data.columns.shown_options` lists them, unless the
benchmark has its own form.

Next: published.py, the scores of others.
"""

import json

from nanolmmr1.data.columns import shown_options
from nanolmmr1.data.images import MARKER
from nanolmmr1.data.schemas import HINTS, MARKERS
from nanolmmr1.data.store import Row

LETTER = "\nAnswer with the option's letter from the given choices"
SHORT = "\nAnswer the question using a single word or phrase"
DRAWN = "\n(A)\n(B)\n(C)\n(D)\n(E)"
ANSWER_FORMS = {"Numerical": "a numerical value", "Expression": "an expression", "Equation": "an equation",
                "Interval": "an interval"}
JSON_GUIDE = """
## Answer Instruction Please provide an answer to the question outlined above. Your response should adhere \n\
to the following JSON format, which includes two keys: 'solution' and 'short answer'. The 'solution' key can contain \n\
detailed steps needed to solve the question, and the 'short answer' key should provide a concise response. If the \
problem is a multiple choice problem, just provide the corresponing choice option, \n\
such as 'A', 'B', 'C', or 'D'. If the answer is a numerical value, format it as a three-digit floating-point number.

Example of expected JSON response format:

""" + json.dumps({"solution": "[Detailed step-by-step explanation]", "short answer": "[Concise Answer]"}, indent=4)


def _within(before: str, problem: str, after: str = "") -> str:
    """The problem with text around it. Pictures that stand first stay first."""
    markers = MARKERS.match(problem)
    assert markers, "the pattern fits an empty text"
    return markers[0] + before + problem[markers.end():] + after


def _apart(row: Row) -> tuple[str, str]:
    """The problem without the lines that the reader has added to list the options, and these lines."""
    lines = shown_options("", "A", row.options, by_place=True)
    return row.problem.removesuffix(lines), lines


def plain(row: Row) -> str:
    """The problem alone. LogicVista publishes no instruction, nor does lmms-eval add one."""
    return row.problem


def mathvista(row: Row) -> str:
    """The column `query` of the hub, built here since testmini.json lacks it: lupantech/MathVista data/query.json."""
    letter, integer, one_decimal, two_decimals, python_list = HINTS
    decimals = two_decimals if row.extra.get("precision") == 2 else one_decimal
    by_type = {"integer": integer, "float": decimals, "list": python_list}
    question, options = _apart(row)
    hint = by_type.get(str(row.extra.get("answer_type")), letter)
    return _within(f"{hint}.\nQuestion: ", question, f"\nChoices:{options}" if options else "")


def mathverse(row: Row) -> str:
    """The column `query_wo`, which asks for the answer directly: the benchmark's headline, and what LMM-R1 asked."""
    query = row.extra.get("query_wo")
    return MARKER * len(row.images) + query if query and isinstance(query, str) else row.problem


def mathvision(row: Row) -> str:
    """mathllm/MATH-V models/Qwen-VL.py. Options that are drawn in the picture are not listed."""
    return _within('Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple '
                   'choice question, only one letter is allowed in the "\\boxed{}".\n', row.problem.removesuffix(DRAWN))


def olympiadbench(row: Row) -> str:
    """OpenBMB/OlympiadBench inference/code/evaluators/evaluator.py; the reader has put the context first."""
    extra, several = row.extra, bool(row.extra.get("is_multiple_answer"))
    forms = [next((text for name, text in ANSWER_FORMS.items() if name in part), "")
             for part in str(extra.get("answer_type")).split(",")]
    if not all(forms):  # a tuple may be a point or the values of unknowns, so the benchmark does not name it
        form = ""
    elif not several:
        form = f"The answer of The problem should be {forms[0]}. "
    elif len(set(forms)) == 1:
        form = f"The problem has multiple answers, each of them should be {forms[0]}. "
    else:
        form = f"The problem has multiple answers, with the answers in order being {', '.join(forms)}. "
    box = "\\boxed{multiple answers connected with commas}" if several else "\\boxed{answer}"
    unit = ", note that the unit of the answer should not be included in \\boxed{}" if extra.get("unit") else ""
    return _within(
        f"The following is an open-ended problem from an International {extra.get('subject', 'Math')} competition. "
        f"{form}Please calculate the answer according to the given requirements and the information provided. Please "
        "use LaTeX format to represent the variables and formulas used in the solution process and results. Please end "
        f'your solution with "So the final answer is {box}{"(unit)" * bool(unit)}." and give the result explicitly'
        f"{unit}.\n", row.problem)


def mmstar(row: Row) -> str:
    """EvolvingLMMs-Lab/lmms-eval tasks/mmstar, which LMM-R1 used; the question has its options."""
    return f"{row.problem}{LETTER} directly"


def mmmu(row: Row) -> str:
    """MMMU-Benchmark/MMMU mmmu/configs/llava1.5.yaml."""
    return row.problem + (f"\n{LETTER} directly." if row.options else f"{SHORT}.")


def emma(row: Row) -> str:
    """EMMA-Bench/EMMA configs/gpt.yaml with the strategy CoT; the reader has put the context first."""
    answer = f"\n{LETTER} and put the letter" if row.options else f"{SHORT} and put the answer"
    return f'{row.problem}{answer} in one "\\boxed{{}}". Please solve the problem step by step.'


def math500(row: Row) -> str:
    """huggingface/lighteval, which LMM-R1 used; the two blanks are its own. simple-evals asks for a line "Answer:"."""
    return ("Solve the following math problem efficiently and clearly.  The last line of your response should be of "
            "the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without "
            "quotes) where ANSWER is just the final number or expression that solves the problem. Think step by step "
            f"before answering.\n\n{row.problem}")


def gpqa(row: Row) -> str:
    """openai/simple-evals common.py."""
    question, _ = _apart(row)
    options = "".join(f"\n{chr(65 + place)}) {text}" for place, text in enumerate(row.options))
    return ("Answer the following multiple choice question. The last line of your response should be of the following "
            "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before "
            f"answering.\n\n{question}\n{options}")


def wemath(row: Row) -> str:
    """We-Math's prompt as several harnesses repeat it; the stored copies of We-Math/We-Math lack the text itself."""
    question, lines = _apart(row)
    return _within(
        "Now, we require you to solve a multiple-choice math question. Please briefly describe your thought process "
        "and provide the final answer(option).\nQuestion: ", question,
        f"\nOption: {row.extra.get('option') or lines}\nRegarding the format, please answer following the template "
        "below, and be sure to include two <> symbols:\n<Thought process>: <<your thought process>> <Answer>: <<your "
        "option>>")


def dynamath(row: Row) -> str:
    """DynaMath/DynaMath evaluation/opensource_json_eval.py."""
    is_float = row.extra.get("answer_type") == "float"
    return _within("## Question\n", row.problem, "Please answer in a floating-point number." * is_float + JSON_GUIDE)


def geometry3k(row: Row) -> str:
    """hiyouga/EasyR1 examples/format_prompt/math.jinja, whose scores are compared; the benchmark itself has none."""
    return (f"{row.problem.strip()} You FIRST think about the reasoning process as an internal monologue and then "
            "provide the final answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final "
            "answer MUST BE put in \\boxed{}.")


def gsm8k(row: Row) -> str:
    """verl's script for this data set, which asks for the form of its answers; openai/grade-school-math has none."""
    return f"{row.problem} Let's think step by step and output the final answer after \"####\"."
