"""The exceptions of slora: one small tree, so that a caller can catch as widely or as narrowly as it likes."""

from slora import _core


class SloraError(Exception):
    """Base of every error that slora raises on purpose."""


class ConfigError(SloraError, ValueError):
    """The engine cannot be built as asked: a model, option or pool that does not work."""


class RequestError(SloraError, ValueError):
    """A request was refused or ended by an error: the message names the value and the limit."""


class UnknownAdapterError(RequestError, KeyError):
    """No adapter is registered under the name."""

    def __str__(self) -> str:  # KeyError would show the message's repr
        return Exception.__str__(self)


class AdapterError(SloraError, ValueError):
    """An adapter checkpoint was refused; the message names the key or tensor."""


class LoadError(SloraError):
    """The base model's files are missing, damaged or of a kind that is not supported."""


class DeviceError(SloraError, RuntimeError):
    """The executor failed: out of memory, a lost device, an exception in a step. The engine has stopped."""


_core.set_exceptions(
    {
        kind.__name__: kind
        for kind in (ConfigError, RequestError, UnknownAdapterError, AdapterError, LoadError, DeviceError)
    }
)
