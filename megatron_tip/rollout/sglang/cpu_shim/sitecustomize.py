"""Stand-ins for packages that SGLang 0.5.23 needs on a machine without a GPU.

Python imports this module by its name at the start of a process. `server.py` puts this folder on PYTHONPATH only for
the servers that it starts with device "cpu": SGLang spawns several processes, and each needs it before any other
import. It uses only the standard library.

1. `sgl_kernel` is a CUDA-only wheel. On the CPU SGLang imports it by name and needs it only for speculative decoding;
   calling anything in it raises.
2. `triton` (1 GB) is imported for kernels that are never launched on a CPU. Its decorators return the function;
   launching one, `kernel[grid](...)`, is a TypeError.
3. `torchvision` is imported for vision models, which are not served here. It must not be installed: the package
   index's wheel is linked against a CUDA torch, and next to a CPU torch its mere presence breaks every import of a
   transformers model with "operator torchvision::nms does not exist", in the trainer too.

A package that is really installed is found first and wins.

The module also announces a plugin to SGLang, which finds plugins as entry points of installed distributions. Its hooks,
in `cpu_hooks.py`, make decoding on a CPU faster and make it respect the requests' seeds.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import pathlib
import sys
import types

PLUGIN = "[sglang.srt.plugins]\nmegatron_tip_cpu = megatron_tip.rollout.sglang.main:register_cpu_hooks\n"
STAND_INS = ("sgl_kernel", "torchvision", "triton")


class StandInClass(type):
    """The type of a stand-in class; each attribute, such as an enumeration's member, is its own name."""

    def __getattr__(cls, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class StandIn(types.ModuleType):
    """A module in which every name exists: a capitalised name is a class, any other a callable module."""

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"
        if full_name in sys.modules:
            return sys.modules[full_name]
        if name[:1].isupper():
            members = {"__module__": self.__name__, "__init__": lambda self, *_, **__: None}
            value = StandInClass(name, (), members)
        else:
            value = StandIn(full_name)
            value.__path__ = []
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        if self.__name__.split(".")[0] != "triton":
            raise RuntimeError(f"{self.__name__} runs on a GPU only; this SGLang runs on the CPU")
        if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType):
            return args[0]  # @triton.jit
        return lambda function: function  # @triton.autotune(...)


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The finder of the stand-ins; it comes last, after every real package."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        if "." not in module.__name__:
            vars(module)["__version__"] = "0.0.0"
        if module.__name__ == "triton":
            vars(module)["cdiv"] = lambda a, b: -(a // -b)
            vars(module)["next_power_of_2"] = lambda n: 1 << (n - 1).bit_length() if n > 0 else 1


class PluginDistribution(importlib.metadata.Distribution):
    """A distribution that consists only of an entry point."""

    def read_text(self, filename):
        texts = {"METADATA": "Name: megatron-tip-cpu\nVersion: 0\n", "entry_points.txt": PLUGIN}
        return texts.get(filename)

    def locate_file(self, path):
        return pathlib.Path(__file__).parent / path


class PluginFinder(importlib.abc.MetaPathFinder):
    """The finder of that distribution; it finds no modules."""

    def find_spec(self, fullname, path=None, target=None):
        return None

    def find_distributions(self, context=None):
        is_meant = context is None or context.name in (None, "megatron-tip-cpu")
        return [PluginDistribution()] if is_meant else []


sys.meta_path += [StandInFinder(), PluginFinder()]
