"""lm-eval's own clients against the server give what the model gives in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny
from running_server import serving

from mm_gpt.inference.assistant import Assistant
from mm_gpt.serving.server.service import Service

lm_eval = pytest.importorskip("lm_eval", reason="the harness is what is tested with")
pytest.importorskip("tenacity", reason="the harness needs its extra `api`")

QUESTIONS = [
    ("A red", [" circle", " image", " sentence"], 0),
    ("Describe the image in one", [" user", " sentence", " blue"], 1),
    ("A red circle on a blue", [" ground", " assistant", " one"], 0),
    ("user assistant", [" circle", " in", " system"], 2),
]
CHOOSING = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITING = """
task: tiny_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
def test_the_harness_gives_the_scores_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assistant = Assistant(*make_tiny())
    assistant.processor.tokenizer.save_folder(tmp_path / "tokenizer")
    with (tmp_path / "questions.jsonl").open("w") as file:
        for question, choices, answer in QUESTIONS:
            written = str(assistant.complete(question, max_new_tokens=6))
            line = {"question": question, "choices": choices, "answer": answer, "written": written}
            file.write(json.dumps(line) + "\n")
    for name, task in (("choosing", CHOOSING), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("FILE", str(tmp_path / "questions.jsonl")))
    with serving(lambda config: Service.of(assistant, "tiny", config)) as (address, _):
        settings = f"model=tiny,base_url={address}/v1/completions,tokenizer={tmp_path}/tokenizer,max_length=200"
        found: Any = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=settings,
            tasks=["tiny_choices", "tiny_texts"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            batch_size=3,
            bootstrap_iters=0,
        )
    scores = [[assistant.logprob(question, choice) for choice in choices] for question, choices, _ in QUESTIONS]
    samples = sorted(found["samples"]["tiny_choices"], key=lambda sample: sample["doc_id"])
    answered = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    for mine, its in zip(scores, answered, strict=True):
        assert its == pytest.approx(mine, abs=1e-4)
    choices = [max(range(3), key=row.__getitem__) for row in scores]
    accuracy = sum(mine == answer for mine, (_, _, answer) in zip(choices, QUESTIONS, strict=True)) / len(QUESTIONS)
    assert found["results"]["tiny_choices"]["acc,none"] == accuracy
    texts = sorted(found["samples"]["tiny_texts"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0].strip() for sample in texts] == [sample["doc"]["written"] for sample in texts]
