"""Who gets a websocket, asked with raw HTTP over real sockets."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.monitor.websocket_kit import TOKEN, Kit, Response, request, serving
from vmm.errors import OptionInvalid
from vmm.monitor.upgrade import MAX_HEAD, Door, check_token
from vmm.monitor.websocket import COMPLAINTS, MAX_SESSIONS, OPENING

pytestmark = pytest.mark.usefixtures("no_leaks")

Changes = dict[str, "str | list[str] | None"]


def sentence(response: Response) -> str:
    assert response.fields["content-type"] == "text/plain; charset=utf-8"
    assert response.fields["x-content-type-options"] == "nosniff"
    assert response.fields["connection"] == "close"
    assert response.body.endswith("\n")
    return response.body[:-1]


async def judged(kit: Kit, **changes: str | list[str] | None) -> tuple[int, str]:
    """Ask with a good request, changed; return status and sentence."""
    async with kit.raw() as raw:
        await raw.stream.send_all(request(kit.port, **changes))  # type: ignore[arg-type]
        response = await raw.response()
    return response.status, "" if response.status == 101 else sentence(response)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_client_that_names_the_port_is_admitted(host: str) -> None:
    async with serving(host=host) as kit:
        own = f"[{host}]" if ":" in host else host
        for name in (f"{own}:{kit.port}", f"localhost:{kit.port}", f"LocalHost:{kit.port}"):
            assert await judged(kit, host=name) == (101, "")
            assert await judged(kit, host=name, origin=f"http://{name}") == (101, "")
        assert kit.log == []


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:{port}",
        "localhost.evil.example:{port}",
        "127.0.0.1.evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1:{port}0",
        "127.0.0.2:{port}",
        "0.0.0.0:{port}",
        "[::1]:{port}",
        "user@127.0.0.1:{port}",
        "localhost:{port}, localhost:{port}",
        "localhost\xe9:{port}",
        "",
    ],
)
async def test_a_host_that_is_not_this_port_is_refused(host: str) -> None:
    async with serving() as kit:
        shown = repr(host.format(port=kit.port).lower().replace("\xe9", "\ufffd")) if host else "empty"
        reason = f"Host is {shown}, and this is 127.0.0.1:{kit.port} (or localhost:{kit.port})"
        assert await judged(kit, host=host) == (403, reason)
        assert kit.log == [f"ws0: a client was refused: {reason}"]


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://evil.example:{port}",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost:{port}",
        "http://127.0.0.1:{port}.evil.example",
        "http://127.0.0.1:{port}/",
        "null",
        "",
    ],
)
async def test_pages_of_any_other_origin_are_refused(origin: str) -> None:
    async with serving() as kit:
        shown = repr(origin.format(port=kit.port)) if origin else "empty"
        reason = f"Origin is {shown}, and only pages of http://127.0.0.1:{kit.port} may connect"
        assert await judged(kit, origin=origin) == (403, reason)


async def test_the_host_and_origin_of_port_80_may_be_without_it() -> None:
    import h11

    def ask(host: str, origin: str) -> None:
        fields = {"host": host, "origin": origin, "upgrade": "websocket", "connection": "upgrade"}
        fields |= {"sec-websocket-key": "MDEyMzQ1Njc4OWFiY2RlZg==", "sec-websocket-version": "13"}
        Door("::1", 80).judge(h11.Request(method="GET", target="/", headers=list(fields.items())))

    ask("[::1]", "http://[::1]")
    ask("[::1]:80", "http://[::1]:80")
    ask("localhost", "http://localhost")
    with pytest.raises(Exception, match=r"Origin is 'http://localhost', and only pages of http://\[::1\] may connect"):
        ask("[::1]", "http://localhost")


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"origin": ["http://127.0.0.1:{port}"] * 2}, 400, "The request has 2 fields origin; one is the most"),
        ({"target": "/qmp"}, 404, "There is nothing at /qmp; the monitor is at /"),
        (
            {"target": "http://127.0.0.1:{port}/"},
            404,
            "There is nothing at http://127.0.0.1:{port}/; the monitor is at /",
        ),
        ({"method": "POST"}, 426, "Only a websocket is here: GET it, with 'Upgrade: websocket'"),
        ({"upgrade": None}, 426, "Only a websocket is here: GET it, with 'Upgrade: websocket'"),
        ({"upgrade": "h2c"}, 426, "Only a websocket is here: GET it, with 'Upgrade: websocket'"),
        ({"connection": "close"}, 426, "Only a websocket is here: GET it, with 'Upgrade: websocket'"),
        ({"content_length": "3"}, 400, "A request for a websocket has no content"),
        ({"transfer_encoding": "chunked"}, 400, "A request for a websocket has no content"),
        ({"sec_websocket_version": "8"}, 400, "Sec-WebSocket-Version must be 13"),
        ({"sec_websocket_version": None}, 400, "Sec-WebSocket-Version must be 13"),
        ({"sec_websocket_key": None}, 400, "Sec-WebSocket-Key must be the base64 of 16 bytes"),
        ({"sec_websocket_key": "c2hvcnQ="}, 400, "Sec-WebSocket-Key must be the base64 of 16 bytes"),
        ({"sec_websocket_key": "\xe9\xe9"}, 400, "Sec-WebSocket-Key must be the base64 of 16 bytes"),
        (
            {"sec_websocket_protocol": "chat, superchat"},
            400,
            "None of the subprotocols offered is 'qmp', the one spoken here",
        ),
        ({"host": None}, 400, "This is no HTTP request: Missing mandatory Host: header"),
        ({"host": ["localhost:{port}"] * 2}, 400, "This is no HTTP request: Found multiple Host: headers"),
    ],
)
async def test_what_is_no_request_for_this_websocket_is_told_why(changes: Changes, status: int, reason: str) -> None:
    async with serving() as kit:
        assert await judged(kit, **changes) == (status, reason.format(port=kit.port))


async def test_what_the_library_could_not_digest_does_not_reach_it() -> None:
    """It takes all of these for ASCII, and lets a UnicodeError end its reader, and so the machine."""
    async with serving() as kit:
        for changes in (
            {"sec_websocket_extensions": "permessage-deflate; \xff"},
            {"cookie": "page=\xff\xfe"},
            {"connection": ["Upgrade", "\xff"]},
            {"sec_websocket_protocol": ["qmp", "\xff"]},
        ):
            assert await judged(kit, **changes) == (101, "")
        assert kit.log == []


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b'{"execute":"qmp_capabilities"}\r\n\r\n',
        b"\r\n\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_told_so(data: bytes) -> None:
    async with serving() as kit:
        response = await kit.refusal(data)
        assert response.status == 400
        assert sentence(response).startswith("This is no HTTP request: ")
        assert await judged(kit) == (101, "")


async def test_a_request_without_end_is_bounded() -> None:
    async with serving() as kit:
        response = await kit.refusal(b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * MAX_HEAD)
        assert response.status == 400
        assert sentence(response) == "This is no HTTP request: Receive buffer too long"


async def test_frames_before_the_answer_are_refused() -> None:
    async with serving() as kit:
        response = await kit.refusal(request(kit.port) + b"\x81\x80\0\0\0\0")
        assert (response.status, sentence(response)) == (400, "Data came behind the request, before it was answered")


async def test_a_client_that_does_not_finish_its_request_is_sent_away(mock_clock: MockClock) -> None:
    async with serving() as kit, kit.raw() as raw:
        await raw.stream.send_all(request(kit.port)[:40])
        await wait_all_tasks_blocked()
        mock_clock.jump(OPENING)
        response = await raw.response()
        assert (response.status, sentence(response)) == (408, "No whole request came within 10 s")


async def test_a_client_that_hangs_up_before_it_asks_is_forgotten() -> None:
    async with serving() as kit:
        for data in (b"", request(kit.port)[:40]):
            async with kit.raw() as raw:
                if data:
                    await raw.stream.send_all(data)
                await raw.stream.send_eof()
                assert await raw.stream.receive_some() == b""
        assert kit.log == []


async def test_one_client_more_than_there_may_be_is_sent_away_until_one_leaves() -> None:
    async with serving() as kit:
        async with trio.open_nursery() as nursery:
            leave = trio.Event()

            async def stay(*, task_status: trio.TaskStatus[None]) -> None:
                async with kit.upgraded():
                    task_status.started()
                    await leave.wait()

            for _ in range(MAX_SESSIONS):
                await nursery.start(stay)
            reason = f"{MAX_SESSIONS} clients are served already; one must leave first"
            assert await judged(kit) == (503, reason)
            leave.set()
        while kit.monitor.sessions:
            await trio.lowlevel.checkpoint()
        assert await judged(kit) == (101, "")


async def test_refusals_are_logged_now_and_then_and_counted(mock_clock: MockClock) -> None:
    async with serving() as kit:
        for _ in range(3):
            await judged(kit, target="/a")
        mock_clock.jump(COMPLAINTS)
        await judged(kit, target="/b")
        assert kit.log == [
            "ws0: a client was refused: There is nothing at /a; the monitor is at /",
            "ws0: a client was refused: There is nothing at /b; the monitor is at / (2 more since the last line)",
        ]


# --- tokens -----------------------------------------------------------------------------------------------

ASK = "This monitor asks for a token: send 'Authorization: Bearer TOKEN', or the subprotocols 'qmp, bearer.TOKEN'"
WRONG = "The token is not the one of this monitor"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ASK),
        ({"sec_websocket_protocol": "qmp"}, ASK),
        ({"sec_websocket_protocol": f"qmp, bearer.{TOKEN}, bearer.{TOKEN}"}, ASK),
        ({"authorization": f"Basic {TOKEN}"}, "Authorization must be of the scheme Bearer"),
        ({"authorization": TOKEN}, "Authorization must be of the scheme Bearer"),
        ({"authorization": "Bearer"}, WRONG),
        ({"authorization": f"Bearer {TOKEN[:-1]}"}, WRONG),
        ({"authorization": f"Bearer {TOKEN}x"}, WRONG),
        ({"authorization": f"Bearer {TOKEN.upper()}"}, WRONG),
        ({"authorization": "Bearer \xe9"}, WRONG),
        ({"sec_websocket_protocol": f"qmp, bearer.{TOKEN[1:]}"}, WRONG),
        ({"authorization": "Bearer wrong", "sec_websocket_protocol": f"qmp, bearer.{TOKEN}"}, WRONG),
    ],
)
async def test_without_the_token_nobody_gets_in(changes: Changes, reason: str) -> None:
    async with serving(token=TOKEN) as kit, kit.raw() as raw:
        await raw.stream.send_all(request(kit.port, **changes))  # type: ignore[arg-type]
        response = await raw.response()
        assert (response.status, sentence(response)) == (401, reason)
        assert response.fields["www-authenticate"] == "bearer"
        assert not any(TOKEN in line for line in kit.log)
        assert not kit.monitor.sessions


async def test_two_tokens_are_not_tried_one_after_the_other() -> None:
    async with serving(token=TOKEN) as kit:
        found = await judged(kit, authorization=["Bearer wrong", f"Bearer {TOKEN}"])
        assert found == (400, "The request has 2 fields authorization; one is the most")


@pytest.mark.parametrize(
    ("changes", "selected"),
    [
        ({"authorization": f"Bearer {TOKEN}"}, None),
        ({"authorization": f"bearer {TOKEN}", "sec_websocket_protocol": "qmp"}, "qmp"),
        ({"sec_websocket_protocol": f"qmp, bearer.{TOKEN}"}, "qmp"),
        ({"sec_websocket_protocol": [f"bearer.{TOKEN}", "qmp"]}, "qmp"),
    ],
)
async def test_the_token_opens_and_is_not_sent_back(changes: Changes, selected: str | None) -> None:
    async with serving(token=TOKEN) as kit, kit.raw() as raw:
        await raw.stream.send_all(request(kit.port, **changes))  # type: ignore[arg-type]
        response = await raw.response()
        assert response.status == 101
        assert response.fields.get("sec-websocket-protocol") == selected
        assert not any(TOKEN in value for value in response.fields.values())


async def test_who_comes_from_elsewhere_does_not_learn_whether_a_token_is_right() -> None:
    async with serving(token=TOKEN) as kit:
        for token in (TOKEN, "wrong"):
            status, _ = await judged(kit, origin="http://evil.example", authorization=f"Bearer {token}")
            assert status == 403


@pytest.mark.parametrize("content", [b"0123456789abcdef", b"  0123456789abcdef\n", b"-._~+-._~+-._~+-", b"x" * 256])
def test_a_token_is_what_its_file_holds_without_white_space(content: bytes) -> None:
    assert check_token(content, "/run/token") == content.strip()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"0123456789abcde",
        b"x" * 257,
        b"0123456789abcdef/",
        b"0123456789abcdef=",
        b"two words are no token",
        b"\xff" * 20,
    ],
)
def test_what_is_no_token_is_refused_and_not_shown(content: bytes) -> None:
    with pytest.raises(OptionInvalid) as caught:
        check_token(content, "/run/token")
    assert str(caught.value) == (
        "token-file: '/run/token' is not a file with a token of 16 to 256 letters, digits and characters -._~+ "
        "and nothing else"
    )


def test_a_door_does_not_show_its_token() -> None:
    assert TOKEN not in repr(Door("127.0.0.1", 1, TOKEN.encode()))
