"""Compact segmentation networks made of templates (Template-NAS, WACV 2020)."""

from __future__ import annotations

from nasfast.methods.segmentation import DecoderMethod, architectures
from nasfast.methods.segmentation.check import CheckConfig
from nasfast.methods.segmentation.tasks import BINDINGS
from nasfast.methods.templates.report import TemplatesReport
from nasfast.methods.templates.settings import DESCRIPTION, PRESETS, SearchConfig, TrainConfig
from nasfast.models.build import TEMPLATES
from nasfast.spaces.template_nas import TemplateNASSpace


class Templates(DecoderMethod):
    """Networks of at most about 0.3 M parameters, built of three templates."""

    name = "templates"
    space = TemplateNASSpace().name
    search_settings = SearchConfig
    train_settings = TrainConfig
    check_settings = CheckConfig
    presets = PRESETS
    description = DESCRIPTION
    model_format = TEMPLATES
    report = TemplatesReport(BINDINGS["segmentation"])
    zoo = architectures("templates")
