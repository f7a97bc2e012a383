"""Write text-only chats with the untouched decoder's own answers.

Mixed into image training they keep the language that the decoder came with: what is sampled from a model and learned
again pulls it back to where it was. The result is committed as examples/data/text_chats.jsonl.

    python examples/make_text_chats.py examples/data/text_chats.jsonl
"""

import argparse
import json
import random
from pathlib import Path

from tqdm import tqdm

from mm_gpt.hub.checkpoint import load_decoder
from mm_gpt.inference.assistant import Assistant
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.transforms import ImageTransformConfig

TOPICS = """
gravity; the water cycle; photosynthesis; volcanoes; the moon; black holes; the human heart; vaccines; sleep;
electricity; magnets; the Roman Empire; the printing press; the Renaissance; the Silk Road; democracy; money;
inflation; supply and demand; insurance; chess; football; swimming; yoga; hiking; cooking rice; baking bread;
making coffee; tea; healthy breakfasts; growing tomatoes; house plants; dogs; cats; horses; bees; whales; birds
of prey; dinosaurs; forests; deserts; rivers; earthquakes; climate; recycling; solar panels; bicycles; trains;
airplanes; cars; bridges; computers; the internet; programming; Python; algorithms; databases; encryption;
artificial intelligence; photography; painting; music theory; the piano; the guitar; poetry; novels; theatre;
film; museums; Paris; Japan; India; Brazil; Africa; mountains; islands; the ocean; the stars; time zones;
calendars; fractions; prime numbers; triangles; probability; statistics; learning a language; writing letters;
giving a talk; job interviews; studying; friendship; holidays
"""
FORMS = (
    "Explain {} to a beginner.",
    "What should I know about {}?",
    "Write a short paragraph about {}.",
    "Give me three facts about {}.",
    "Why is {} interesting?",
    "Tell me a short story that involves {}.",
    "List some common words connected with {}.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=480)
    parser.add_argument("--max-new-tokens", type=int, default=110)
    args = parser.parse_args()
    decoder, tokenizer = load_decoder("smollm2-135m-instruct")
    # No image is ever shown to it, so the vision side is the smallest there is.
    model = MMGPT(
        ModelConfig(
            decoder="smollm2-135m-instruct",
            vision=VisionConfig(model="timm/test_vit", image_size=32),
            connector=ConnectorConfig(kind="linear"),
        ),
        decoder,
    )
    processor = Processor(
        tokenizer,
        ProcessorConfig(image=ImageTransformConfig(size=32), tokens_per_image=model.tokens_per_image, max_length=1024),
        vocab_size=decoder.config.vocab_size,
    )
    assistant = Assistant(model, processor)
    prompts = [form.format(topic.strip()) for topic in TOPICS.split(";") for form in FORMS]
    random.Random(0).shuffle(prompts)
    prompts = prompts[: args.count]
    with args.out.open("w") as file:
        for start in tqdm(range(0, len(prompts), 16)):
            batch = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 16]]
            config = GenerationConfig(temperature=0.8, top_p=0.95, max_new_tokens=args.max_new_tokens, seed=start)
            answers = assistant.engine.generate([processor.chat(messages) for messages in batch], config)
            for messages, answer in zip(batch, answers, strict=True):
                turn = {"role": "assistant", "content": str(answer), "complete": answer.finish_reason == "stop"}
                file.write(json.dumps({"messages": [*messages, turn]}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
