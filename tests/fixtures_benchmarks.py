"""Every benchmark in its published layout, small: invented rows of all kinds of gold answers, with real pictures."""

import copy

import published

BYTES = {"bytes": {"__bytes__": "of a picture"}, "path": None}
# Benchmark -> what rows of its source differ in from the row in schemas.json. A column of an object is dotted.
ROWS = {
    "mathvista": [
        {"question": "Which bar is tallest?", "answer": "blue"},
        {"question": "Is the tree taller than the house?", "choices": ["Yes", "No"], "answer": "No",
         "metadata.task": "visual question answering", "metadata.category": "general-vqa"},
        {"question": "Find x.", "choices": ["10", "12", "14", "16"], "answer": "14",
         "metadata.task": "geometry problem solving", "metadata.category": "math-targeted-vqa"},
        {"question": "What is the angle?", "choices": ["25°", "35°", "45°"], "answer": "35°",
         "metadata.task": "geometry problem solving", "metadata.language": "chinese"},
        {"question": "Which two are alike?", "choices": ["left", "right", "right", "both"], "answer": "right"},  # dirty
        {"question": "How long is it?", "choices": ["3 cm", "$4$ cm", "five cm"], "answer": "$4$ cm"},
        {"question": "How many are left?", "answer_type": "integer", "answer": "7"},
        {"question": "How much does it cost?", "unit": "$", "answer_type": "integer", "answer": "1200"},
        {"question": "How far is it?", "unit": "m", "precision": 1.0, "answer_type": "float", "answer": "3.5"},
        {"question": "What is the ratio?", "precision": 2.0, "answer_type": "float", "answer": "0.25",
         "metadata.task": "math word problem", "metadata.grade": "college"},
        {"question": "Which years?", "answer_type": "list", "answer": "[1999, 2001]",
         "metadata.task": "textbook question answering"},
        {"question": "What is the temperature?", "answer_type": "integer", "answer": "-4"}],
    "mathverse": [
        *({"problem_index": "1", "question": "A square has side 3. Find its area.\nChoices:\nA:6\nB:9\nC:12\nD:3",
           "answer": "B"} for _ in range(5)),
        *({"problem_index": "2", "question": "Find AB.", "question_type": "free-form", "answer": "$2\\sqrt{3}$ cm",
           "metadata.subject": "Solid Geometry", "metadata.subfield": "Length"} for _ in range(5)),
        {"problem_index": "3", "question": "Which hold?\nChoices:\nA: one\nB: two\nC: six", "answer": "A\nC"},  # dirty
        {"problem_index": "4", "question": "Find the angle.", "question_type": "free-form", "answer": "35掳"},  # dirty
        {"problem_index": "5", "question": "Which graph?\nChoices:\nA: $y=x$\nB: $y=2x$", "answer": "(B)"},
        {"problem_index": "6", "question": "State the range.", "question_type": "free-form", "answer": "$(0, 4]$",
         "metadata.subject": "Functions"}],
    "mathvision": [
        {"question": "How many triangles?\n<image1>", "answer": "C"},
        {"question": "Which figure?\n<image1>", "options": list("ABCDE"), "answer": "E", "subject": "topology"},
        {"question": "Which length?\n<image1>", "options": ["$\\sqrt{2}$", "2", "$\\pi$", "4", "5"], "answer": "A",
         "subject": "metric geometry - length", "level": 5},
        {"question": "Which angle?\n<image1>", "options": ["25°", "35°", "45°", "55°", "65°"], "answer": "B",
         "subject": "metric geometry - angle", "level": 4},
        {"question": "Compare <image1> with <image2>.", "options": [], "answer": "\\frac{3}{2}", "level": 3},
        {"question": "<image1>\nHow many ways?", "options": [], "answer": "140", "subject": "combinatorics"},
        {"question": "No marker is here.", "options": [], "answer": "$2\\sqrt{3}-1$", "subject": "solid geometry"},
        {"question": "Which letter?\n<image1>", "options": [], "answer": "D", "subject": "logic", "level": 1},
        {"question": "Where is it?\n<image1>", "options": [], "answer": "(2,-3)", "subject": "analytic geometry"},
        {"question": "What is left?\n<image1>", "options": [], "answer": "\\boxed{25}", "subject": "arithmetic"},
        {"question": "Which part is it?\n<image1>", "options": [], "answer": "12.5\\%", "subject": "statistics"},
        {"question": "For which x?\n<image1>", "options": [], "answer": "x=5", "subject": "algebra"}],
    "olympiadbench_en": [
        {"question": "Solve <image_1>.", "final_answer": ["$1,-1$"], "is_multiple_answer": True},
        {"question": "Find the mass in <image_1>.", "final_answer": ["$2.5$"], "unit": "kg", "error": "1e-1",
         "context": "A body slides.", "subject": "Physics", "subfield": "Mechanics"},
        {"question": "Find n.", "final_answer": ["12"], "modality": "Text-only", "subfield": "Number Theory"},
        {"question": "Find $v$ and $a$.", "final_answer": ["$3.0, 9.8$"], "is_multiple_answer": True, "unit": "m/s",
         "error": "0.1,0.2", "answer_type": "Numerical,Numerical", "modality": "Text-only", "subject": "Physics"},
        {"question": "Where do they meet in <image_1>?", "final_answer": ["$(3,4)$"], "answer_type": "Tuple"},
        {"question": "For which $x$ in <image_1>?", "final_answer": ["$(0,1]$"], "answer_type": "Interval"},
        {"question": "Express it.", "final_answer": ["$\\frac{n(n+1)}{2}$"], "answer_type": "Expression",
         "modality": "Text-only", "subfield": "Combinatorics"},
        {"question": "Which line is in <image_1>?", "final_answer": ["$y=2x+1$"], "answer_type": "Equation"},
        {"question": "Give both.", "final_answer": ["$2$, $x+1$"], "answer_type": "Numerical,Expression",
         "is_multiple_answer": True, "modality": "Text-only"},
        {"question": "Give the angle.", "final_answer": ["$\\pm 30$"], "unit": "$^{\\circ}$", "modality": "Text-only"},
        {"question": "Describe it.", "final_answer": ["downwards"], "answer_type": "Need_human_evaluate",
         "modality": "Text-only", "subject": "Physics", "context": "A stone falls."},
        {"question": "How large is <image_1>?", "final_answer": ["$2\\sqrt{3}$"], "subfield": "Geometry"},
        {"question": "求解。", "final_answer": ["$2$"], "language": "Chinese", "modality": "Text-only"},
        {"question": "Prove it.", "final_answer": ["it"], "question_type": "Theorem proof", "modality": "Text-only"}],
    "mmstar": [
        {"question": f"What is in picture {number}?\nOptions: A: circle, B: square, C: star, D: line",
         "answer": "ABCD"[number % 4], "category": ("math", "coarse perception", "logical reasoning")[number % 3],
         "l2_category": ("geometry", "image emotion", "code & sequence reasoning")[number % 3] + " ii" * (number > 8)}
        for number in range(12)],
    "mmmu": [
        {"id": "validation_Accounting_901", "answer": "C"},
        {"id": "validation_Art_Theory_3", "question": "<image 1> Whose is it?", "options": "['Klee\\'s', \"Miro's\"]",
         "answer": "B", "topic_difficulty": "Hard"},
        {"id": "validation_Music_7", "question": "<image 1> Which bar fits?", "options": "['<image 2>', '<image 3>']",
         "image_2": BYTES, "image_3": BYTES, "answer": "A"},
        {"id": "validation_Math_12", "question": "<image 1> How long?", "options": "['\\\\frac{1}{2}', '2', '$3$']",
         "answer": "A", "img_type": "['Diagrams', 'Plots and Charts']"},
        {"id": "validation_Physics_2", "question": "<image 1> Which?", "options": "['1 N', '2 N', '3 N', '4 N', '5 N']",
         "answer": "E"},
        *({"id": f"validation_{name}_{number}", "question": f"<image 1> {question}", "options": "[]",
           "question_type": "open", "answer": answer}
          for number, (name, question, answer) in enumerate([
              ("Finance", "What is it worth?", "['1,200', '1200', '$1200']"), ("Energy_and_Power", "Which?", "8.4"),
              ("Chemistry", "Which gas?", "Oxygen"), ("Electronics", "What current in mA?", "-0.75"),
              ("Mechanical_Engineering", "How many?", "24"), ("Computer_Science", "In which order?", "A B D C"),
              ("Agriculture", "What share?", "['0.5', '50%']")])),
        {"id": "validation_History_4", "question": "<image 1> When?", "options": "['1066', '1492']", "answer": "B"}],
    "math500": [
        {"problem": f"Compute number {number}.", "answer": answer, "subject": subject, "level": 1 + number % 5}
        for number, (answer, subject) in enumerate([
            ("42", "Algebra"), ("\\frac{3}{4}", "Prealgebra"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "Precalculus"),
            ("[0, 3)", "Algebra"), ("\\text{Evelyn}", "Prealgebra"), ("1,-2", "Intermediate Algebra"),
            ("90^\\circ", "Geometry"), ("52_8", "Number Theory"), ("x^2+2x+1", "Algebra"), ("10\\%", "Prealgebra"),
            ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "Precalculus"), ("11\\sqrt2", "Geometry")])],
    "gpqa_diamond": [
        {"Record ID": f"rec{number}", "Question": f"Invented question number {number}?", "Correct Answer": right,
         "High-level domain": ("Physics", "Chemistry", "Biology")[number % 3],
         **{f"Incorrect Answer {place}": text for place, text in enumerate(wrong, 1)}}
        for number, (right, *wrong) in enumerate([
            ("alpha", "beta", "gamma", "delta"), ("10^-4 eV", "10^-8 eV", "10^-9 eV", "10^-11 eV"),
            ("3", "4", "5", "6"), ("x, then y", "y, then x", "x", "y"), ("all of them", "none", "one", "two"),
            ("$\\frac{1}{2}$", "$\\frac{1}{3}$", "$2$", "$3$"), ("-1", "0", "1", "2"), ("A", "B", "C", "D"),
            ("30%", "40%", "50%", "60%"), ("yes", "no", "maybe", "never"), ("a\nb", "b\na", "a", "b"),
            ("2.5 m", "5 m", "7.5 m", "10 m")])],
    "wemath": [
        {"ID": f"{steps}steps_{number}", "question": f"Part {part} of problem {number}?", "answer": "ABCDE"[number % 5],
         "key": f"{steps}steps_{part}", "image_path": f"{steps}steps/image/{number}-{part}.png"}
        for steps, number in ((2, 901), (2, 902), (3, 903), (3, 904)) for part in [*range(1, steps + 1), "multi"]],
    "logicvista": [
        {"imagename": f"v{number}.png", "question": f"Which figure is next in row {number}? Select from A, B, C and D.",
         "answer": answer, "skill": [skill]}
        for number, (answer, skill) in enumerate([
            ("A", "inductive"), ("B", "deductive"), ("C", "numerical"), ("D", "spatial"), ("A, C", "mechanical"),
            ("B, D", "inductive"), ("E", "deductive"), ("3", "numerical"), ("F", "spatial"), ("G", "mechanical"),
            ("A", "deductive"), ("", "inductive"), ("C", "inductive")])],
    "dynamath": [
        {"id": str(seed), "question": f"{question} Variant {variant}.", "ground_truth": answer.format(variant),
         "answer_type": kind, "subject": subject}
        for seed, question, answer, kind, subject, variants in (
            (901, "What is the slope?", "{}.25", "float", "algebra", 10),
            (902, "Which holds? choice: (A) even (B) odd", "B", "multiple choice", "arithmetic", 10),
            (903, "What is the shape called?", "a {}-sided polygon", "text", "plane geometry", 2))
        for variant in range(variants)],
    "emma": [
        {"pid": f"{subject.lower()}_{number}", "question": f"{question} <image_1>", "options": options,
         "answer": answer, "type": "Multiple Choice" if options else "Open-ended", "subject": subject,
         "context": context}
        for number, (subject, question, options, answer, context) in enumerate([
            ("Math", "Which cube?", list("ABCD"), "C", None), ("Math", "How many faces?", None, "7", None),
            ("Math", "Which net?", ["<image_2>", "<image_3>"], "B", None), ("Math", "What part?", None, "1/3", None),
            ("Physics", "Which way?", ["up", "down"], "A", "A ball is thrown."), ("Physics", "When?", None, "3", None),
            ("Physics", "Which force?", ["1 N", "2 N", "3 N"], "C", None), ("Chemistry", "What?", None, "C=O", None),
            ("Chemistry", "Which bond?", ["single", "double"], "B", "Count the lines."),
            ("Chemistry", "How many bonds?", None, "12", None), ("Coding", "Which?", list("AB"), "A", "plt.plot(x)"),
            ("Coding", "Which line?", ["plt.bar(x)", "plt.pie(x)"], "B", None)])],
    "geometry3k": [
        {"id": number, "problem": f"<image>Find x of figure {number}.", "answer": choices[place], "choices": choices,
         "ground_truth": "ABCD"[place]}
        for number, (place, *choices) in enumerate([
            (1, "10", "12", "14", "16"), (0, "2 \\sqrt { 3 }", "3", "4", "6"), (3, "1.5", "2.5", "3.5", "4.5"),
            (2, "15", "30", "45", "60"), (0, "\\frac { 1 } { 2 }", "1", "2", "3"), (1, "8", "9", "10", "11"),
            (2, "5 \\pi", "10 \\pi", "20 \\pi", "25"), (3, "7", "17", "27", "37"), (1, "0.6", "0.8", "1.2", "1.6"),
            (0, "100", "110", "120", "130"), (2, "1", "2", "3", "4"), (1, "22.5", "45.5", "67.5", "90")])],
    "gsm8k": [
        {"question": f"Tom has {number} boxes of 4 pens. How many pens?", "answer": f"Work.\n#### {answer}"}
        for number, answer in enumerate("12 1,200 -3 0 2.5 70000 18 3 540 20 64 260".split(), 2)]}
ROWS["mathvision_testmini"] = ROWS["mathvision"]
ROWS["olympiadbench_mm_maths"] = [  # the row of physics, the Chinese one and the proof are not of this benchmark
    row if number in (1, 12, 13) else row | {"modality": "Multimodal", "subject": "Math", "context": None,
                                             "question": row["question"].replace("<image_1>", "it") + " See <image_1>."}
    for number, row in enumerate(ROWS["olympiadbench_en"])]
ROWS["olympiadbench_mm_maths"].append({"question": "How many are in <image_1>?", "final_answer": ["8"]})
DYNAMATH = {"id": "", "question": "", "image": "image/1.png", "decoded_image": BYTES, "ground_truth": "",
            "answer_type": "", "subject": "", "knowledge_level": "high school"}  # as on the hub
EMMA = {"pid": "", "question": "", "options": None, "answer": "", **{f"image_{number}": BYTES for number in (1, 2, 3)},
        "image_4": None, "image_5": None, "solution": "", "subject": "", "task": "invented", "category": "invented",
        "source": "Newly annotated", "type": "", "context": None}
SOURCE = {"dynamath": "dynamath_hub", "gpqa_diamond": "gpqa", "geometry3k": "geometry3k_hiyouga",
          "mathvision_testmini": "mathvision", "olympiadbench_en": "olympiadbench",
          "olympiadbench_mm_maths": "olympiadbench"}  # in published.SOURCES, if another one


def _changed(name, row, changes):
    """The row with other values, and with what follows from them."""
    for column, value in changes.items():
        head, _, inner = column.partition(".")
        if inner:
            row[head][inner] = value
        else:
            row[column] = value
    if name == "mathvista" and row["answer_type"] != "text":
        row |= {"question_type": "free_form", "choices": None}
    elif name == "mathverse":
        row["query_wo"] = f"Please directly answer.\nQuestion: {row['question']}"
    elif "olympiadbench" in name:
        row |= {"is_multiple_answer": changes.get("is_multiple_answer", False),
                "image_1": row["image_1"] if row["modality"] == "Multimodal" else None}
    elif name == "emma" and "<image_2>" not in str(row["options"]):
        row |= {"image_2": None, "image_3": None}
    return row


def published_rows(name):
    """The rows of a benchmark as its source has them; pictures are placeholders."""
    base = {"dynamath": DYNAMATH, "emma": EMMA}.get(name) or published.SOURCES[SOURCE.get(name, name)]["row"]
    rows = [_changed(name, copy.deepcopy(base), changes) for changes in ROWS[name]]
    if "mathvision" in name or "olympiadbench" in name:
        rows = [row | {"id": type(row["id"])(9001 + number)} for number, row in enumerate(rows)]
    if name == "mathverse":
        versions = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
        for number, row in enumerate(rows):
            row |= {"sample_index": str(number), "problem_version": versions[number % 5]}
            if row["problem_version"] == "Vision Only":
                row |= {"question": "", "query_wo": "According to the question shown in the image, please answer."}
        rows.append(copy.deepcopy(rows[0]) | {"problem_version": "Text Only"})
    return rows


def publish_benchmark(name, folder):
    """Write a benchmark's rows as they are published; returns what a user names as the source."""
    small = sorted(published.pictures(), key=len)[:40]
    return published.write(SOURCE.get(name, name), folder, published_rows(name), small)
