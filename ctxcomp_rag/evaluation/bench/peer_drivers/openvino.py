"""OpenVINO: the random decoder exported as a model that keeps its own cache, run on one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from .peer import DecoderFolder, Peer, package


class OpenVINO(Peer):
    """Reads token ids and decodes greedily; weights and cache in float32."""

    packages: tuple[str, ...] = ("torch", "transformers", "optimum-intel", "openvino")
    rows: ClassVar[tuple[str, ...]] = ("openvino-raw",)

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.filled = 0
        folder = DecoderFolder(task["config"])
        exported = folder.path / "exported"
        package("optimum.intel").OVModelForCausalLM.from_pretrained(
            folder.path, export=True, compile=False, load_in_8bit=False, stateful=True).save_pretrained(exported)
        self.request = self._compiled(exported / "openvino_model.xml").create_infer_request()

    @staticmethod
    def _compiled(path: Path) -> Any:
        core = package("openvino").Core()
        model, ops = core.read_model(path), package("openvino.opset13")
        head = model.output("logits").get_node().input_value(0).get_node()
        # the exported head runs over every position; as openvino-genai does, only the last one is left to it
        head.input(0).replace_source_output(ops.gather(head.input_value(0), [-1], 1).output(0))
        model.validate_nodes_and_infer_types()
        return core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY",
                                                 "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"})

    def _read(self, ids: list[int]) -> None:
        np = package("numpy")
        begin, self.filled = self.filled, self.filled + len(ids)
        found = self.request.infer({"input_ids": np.array([ids]), "attention_mask": np.ones((1, self.filled), np.int64),
                                    "position_ids": np.arange(begin, self.filled)[None],
                                    "beam_idx": np.zeros(1, np.int32)})
        self.token = int(found["logits"][0, -1].argmax())

    def first(self, row: str) -> int:
        self.request.reset_state()
        self.filled = 0
        self._read([*self.text, *self.question])
        return self.filled

    def following(self) -> None:
        self._read([self.token])
