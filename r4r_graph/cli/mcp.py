"""`r4r mcp`: the recommender's tools for MCP clients."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from r4r_graph.cli.options import (
    AdaptersOption,
    BaseOption,
    BudgetsOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    HistoryOption,
    ItemsOption,
    MismatchOption,
    RationalesOption,
    ReadoutOption,
    ReviewsOption,
    ScaleOption,
    SeedOption,
    checked_knobs,
    err,
    load,
    parse_budgets,
)
from r4r_graph.errors import MissingExtraError, SettingError

LOOPBACK = "127.0.0.1"


def mcp(
    reviews: ReviewsOption,
    items: ItemsOption = None,
    user: Annotated[
        str | None, typer.Option(help="Tell of this user only; the tools then ask for none.")
    ] = None,
    http: Annotated[
        bool, typer.Option("--http", help="Streamable HTTP instead of stdin and stdout.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="With --http: listen here. Anywhere else, others can reach it.")
    ] = LOOPBACK,
    port: Annotated[int, typer.Option(help="With --http.", min=1, max=65535)] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="With --http: a further name under which clients may reach it."),
    ] = None,
    history: HistoryOption = None,
    rationales: RationalesOption = 1,
    readout: ReadoutOption = "mean",
    base: BaseOption = "smollm2-135m",
    adapters: AdaptersOption = None,
    scale: ScaleOption = "1-5",
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    budgets: BudgetsOption = None,
    allow_prompt_mismatch: MismatchOption = False,
    engine: EngineOption = None,
) -> None:
    """Serve rate_item, recommend_items and explain_user to an MCP client, over stdin and stdout
    (the client starts this command) or over HTTP. The log goes to stderr."""
    from r4r_graph.mcp_server import PATH, check_address, mcp_server, serve_http, serve_stdio

    if not http and (host != LOOPBACK or port != 8000 or allow_host):
        raise SettingError("--host, --port and --allow-host need --http")
    if find_spec("mcp") is None:  # before a model is loaded for it
        raise MissingExtraError("the MCP server", "mcp")
    if http:
        check_address(host, port)
    knobs = checked_knobs(history=history, rationales=rationales, readout=readout, seed=seed)
    recommender = load(
        reviews,
        items,
        base,
        adapters,
        scale=scale,
        device=device,
        dtype=dtype,
        engine=engine,
        allow_prompt_mismatch=allow_prompt_mismatch,
        budgets=parse_budgets(budgets),
    )
    with recommender:
        server = mcp_server(recommender, user_id=user, **knobs)
        if http:
            shown = f"[{host}]" if ":" in host else host
            where = f"http://{shown}:{port}{PATH}"
            err.print(f"serving MCP at {where}", markup=False, soft_wrap=True)
            serve_http(server, host, port, allowed_hosts=allow_host or ())
        else:
            serve_stdio(server)
