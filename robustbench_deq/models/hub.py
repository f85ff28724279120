"""Saved models on the Hugging Face hub, by huggingface_hub's own mixin: an optional extra, imported by who uses it.

    HubModel.of("deq-conv.digits-joint-l2").push_to_hub("me/deq-conv-digits")
    model = HubModel.from_pretrained("me/deq-conv-digits").model

A repository, or the folder that `save_pretrained` writes, holds `model.json` and `model.safetensors` as `models.io`
writes them, a README for readers, and the mixin's own `config.json`, of which only the mixin reads. The digest is
checked, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.models.cards import DESCRIPTION_NAME, Card, describe, describe_model
from robustbench_deq.models.io import WEIGHTS_NAME, load_folder, load_model, save_model

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
except ImportError:
    raise UsageError.of(
        "robustbench_deq.models.hub",
        expected="the package huggingface_hub",
        got="none",
        fix="pip install 'robustbench-deq[hub]'",
    ) from None


class HubModel(
    ModelHubMixin, library_name="robustbench-deq", tags=["adversarial-robustness", "deep-equilibrium-model"]
):
    """A model of a registered family with its name and card; `push_to_hub`, `save_pretrained` and `from_pretrained` are
    the mixin's.

    Raises:
        UsageError: from `from_pretrained`, as `models.io.load_folder`.
    """

    def __init__(self, model: EquilibriumModel, name: str, card: Card) -> None:
        self.model, self.name, self.card = model, name, card

    @classmethod
    def of(cls, source: str) -> HubModel:
        """The saved model behind a registry name or a folder."""
        described = describe_model(source)
        return cls(load_model(source), described.name, described.card)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.model, save_directory, self.name, self.card)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **_: object,  # what config.json says of the arguments of __init__: model.json decides
    ) -> HubModel:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[DESCRIPTION_NAME, WEIGHTS_NAME],
                )
            )
        described = describe(folder)
        return cls(load_folder(folder), described.name, described.card)

    def generate_model_card(self) -> ModelCard:
        """The README: what the card says."""
        info = self._hub_mixin_info.model_card_data
        data = ModelCardData(library_name=info.library_name, tags=info.tags)
        said = {key: value for key, value in self.card.model_dump(mode="json").items() if value not in (None, "", {})}
        said.get("evaluation", {}).pop("config", None)  # long, and in model.json
        rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in said.items())
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {self.name}\n\n"
            f"A deep equilibrium model of the family `{self.model.family}`, with its robustness as judged on the test "
            f"split.\n\n| | |\n|---|---|\n{rows}\n"
        )
