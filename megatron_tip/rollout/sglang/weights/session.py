"""The session of a server in which it takes weights bucket by bucket."""

from megatron_tip.errors import ServerRefusedError
from megatron_tip.rollout.sglang.client import SGLangClient


def open_session(client: SGLangClient, version: str) -> None:
    """Stops sampling and opens the server for weights; until they are complete, its version says so.

    Raises:
        ServerError: the server does not answer or refuses.
    """
    client.pause("abort")
    client.flush_cache()
    client.weights_endpoint(
        "update_weight_version", {"new_version": f"{version} incomplete", "abort_all_requests": True}
    )
    try:
        client.weights_endpoint("begin_weight_update")
    except ServerRefusedError:  # an earlier failure left a session open
        client.weights_endpoint("end_weight_update")
        client.weights_endpoint("begin_weight_update")


def close_session(client: SGLangClient, version: str) -> None:
    """Ends the session; the server samples with the weights `version`.

    Raises:
        ServerError: the server does not answer or refuses.
    """
    client.weights_endpoint("end_weight_update")
    client.flush_cache()
    client.weights_endpoint("update_weight_version", {"new_version": version, "abort_all_requests": False})
    client.resume()
