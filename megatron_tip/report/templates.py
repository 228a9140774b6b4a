"""The templates of pages: one environment that escapes values and refuses names that are missing."""

from importlib.resources import files

import jinja2

from megatron_tip.report.visible_text import visible


def read_asset(name: str, package: str = "megatron_tip.report") -> str:
    """Returns a file of the `page` folder of `package`."""
    return (files(package) / "page" / name).read_text(encoding="utf-8")


def page_template(name: str, package: str = "megatron_tip.report") -> jinja2.Template:
    """Returns the template `name` of the `page` folder of `package`, which may include its neighbours."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda asset: read_asset(asset, package)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    return environment.get_template(name)
