"""The page of `floe ui` in a browser: over real mounts, and over a node with two hundred."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support import browser, seaweed
from support.faultproxy import LATE, FaultProxy
from support.floe_node import Node, wait_until
from support.livenode import crowded_state

from floe.cli.ui_server import PageServer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.browser(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture
def driver(chromium):
    """The browser with an empty page: the last test's asks a server that is gone, and says so in the console."""
    chromium.get("about:blank")
    browser.console(chromium)
    return chromium


@contextlib.contextmanager
def ui(node, *flags):
    """`floe ui` on `node`; the address that it prints, into a file as somebody who looks for it there gets it."""
    environ = {key: value for key, value in node.environ.items() if key != "PYTHONUNBUFFERED"}
    said, wrong = node.home / "ui.out", node.home / "ui.err"
    with said.open("wb") as out, wrong.open("wb") as err:
        command = [sys.executable, "-m", "floe", "ui", "--listen", "127.0.0.1:0", *flags]
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=err)
    try:
        wait_until(lambda: said.read_text().endswith("\n") or process.poll() is not None, 60)
        assert process.poll() is None, wrong.read_text()
        yield said.read_text().strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, wrong.read_text()
    finally:
        process.kill()
        process.wait()


class Crowd:
    """A node that has much to show."""

    def sample(self):
        return crowded_state(200)

    def timeline(self, _key, _at):
        return None


@pytest.fixture
def crowd():
    """The address of a page of two hundred mounts."""
    with served(Crowd()) as server:
        yield f"http://127.0.0.1:{server.port}/"


@contextlib.contextmanager
def served(shown, host="127.0.0.1", token=None):
    server = PageServer(host, 0, shown, lambda found: found, token=token)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def samples(driver):
    return int(driver.find_element(By.TAG_NAME, "body").get_attribute("data-samples") or 0)


def text(driver, css):
    return driver.find_element(By.CSS_SELECTOR, css).text


def frames(driver):
    return [one.get_attribute("aria-label") for one in driver.find_elements(By.CSS_SELECTOR, "#trees canvas")]


def painted(driver, colour):
    """Pixels of the first frame map in the colour that the page's style gives this name."""
    return driver.execute_script(
        """
        const canvas = document.querySelector("#trees canvas"), copy = document.createElement("canvas");
        [copy.width, copy.height] = [canvas.width, canvas.height];
        const to = copy.getContext("2d", { willReadFrequently: true });
        to.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim();
        to.fillRect(0, 0, 1, 1);
        const wanted = to.getImageData(0, 0, 1, 1).data.slice(0, 3).join();
        to.drawImage(canvas, 0, 0);
        const { data } = to.getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let at = 0; at < data.length; at += 4) if (data.slice(at, at + 3).join() === wanted) count += 1;
        return count;
        """,
        f"--{colour}",
    )


def stalls(driver):
    """What the waterfall of the last start says of each stall; asked for again, as by somebody who closes and opens it."""
    summary = driver.find_element(By.CSS_SELECTOR, "#starts summary")
    summary.click()
    summary.click()
    rows = "return [...document.querySelectorAll('#starts .waterfall tbody tr')].map(row => row.innerText)"
    return [row for row in driver.execute_script(rows) if "stall" in row]


@pytest.fixture
def proxy():
    """In front of the shared S3 server, and may make it slow."""
    with FaultProxy(seaweed.running().endpoint) as made:
        yield made


def test_the_page_follows_a_mount_that_is_read(driver, proxy, tmp_path):
    server = seaweed.running()
    (tmp_path / "node").mkdir()
    node = Node(tmp_path / "node")
    url = server.url(server.bucket(), "fleet", endpoint=proxy.url)
    node.environ |= {**server.environment(), "FLOE_STORE": url, "FLOE_INDEX": "none", "FLOE_READAHEAD": "0"}
    folder, mountpoint = tmp_path / "m", node.home / "mnt"
    folder.mkdir()
    for number in range(4):
        (folder / f"weights-{number}").write_bytes(os.urandom(4 << 20))
    try:
        node.floe("model", "push", folder, "iris:1")
        node.floe("model", "mount", "iris:1", mountpoint)
        with ui(node) as address:
            driver.get(address)
            wait_until(lambda: "1 tree is mounted" in text(driver, "#count") and frames(driver), 60)
            assert "iris:1" in text(driver, "#trees")
            assert frames(driver) == ["0 % of the frames are here, 0 % were read, 0 % were fetched ahead and not read"]
            assert painted(driver, "touched") == 0
            assert (mountpoint / "weights-0").read_bytes() == (folder / "weights-0").read_bytes()
            # Nobody reloads: the page itself finds what was read.
            wait_until(lambda: "25 % of the frames are here, 25 % were read" in frames(driver)[0], 60)
            assert painted(driver, "touched") > 0
            assert painted(driver, "absent") > painted(driver, "touched")
            wait_until(lambda: "iris:1" in text(driver, "#starts"), 60)
            driver.find_element(By.CSS_SELECTOR, "#starts summary").click()
            wait_until(lambda: driver.find_elements(By.CSS_SELECTOR, "#starts .waterfall tbody tr"), 60)
            assert "iris:1 at" in text(driver, "#starts .waterfall")
            fault = proxy.fault(LATE, matches="/packs/", times=1, seconds=0.3)
            assert (mountpoint / "weights-1").read_bytes() == (folder / "weights-1").read_bytes()
            assert fault.hits == 1
            wait_until(lambda: any("weights-1" in row and "store" in row for row in stalls(driver)), 60)
            for number in range(2, 4):
                assert (mountpoint / f"weights-{number}").read_bytes() == (folder / f"weights-{number}").read_bytes()
            wait_until(lambda: "100 % of the frames are here, 100 % were read" in frames(driver)[0], 60)
            wait_until(lambda: "100 %" in text(driver, "#trees td.number"), 60)
            assert "the snapshotter: not running systemctl start floe-snapshotter" in text(driver, "#problems")
            assert browser.console(driver) == []
        node.floe("umount", mountpoint)
    finally:
        node.clean_up()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_two_hundred_mounts_are_accessible(driver, crowd, scheme):
    browser.prefer(driver, scheme)
    driver.get(crowd)
    wait_until(lambda: samples(driver) > 0, 60)
    assert text(driver, "#count") == "200 trees are mounted."
    assert len(frames(driver)) == 200
    assert painted(driver, "here") > 0
    assert "floe doctor looked at" in text(driver, "#examined")
    assert browser.violations(driver) == []
    assert browser.console(driver) == []
    before = samples(driver)
    wait_until(lambda: samples(driver) > before, 60)


def test_all_can_be_reached_and_used_by_the_keyboard(driver, crowd):
    driver.get(crowd)
    wait_until(lambda: samples(driver) > 0 and driver.find_elements(By.CSS_SELECTOR, "#starts summary"), 60)
    reached = []
    for _ in range(8):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        active = driver.switch_to.active_element
        reached.append(active.get_attribute("id") or active.get_attribute("class") or active.tag_name)
        outline = driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", active)
        assert outline != "none" or active.tag_name == "body"
        if reached[-1] == "filter":
            active.send_keys("app-17")
            assert text(driver, "#count") == "11 of 200 trees are mounted."  # 17 and 170 to 179
        if reached[-1] == "summary":
            active.send_keys(Keys.ENTER)
            assert driver.find_element(By.CSS_SELECTOR, "#starts details").get_attribute("open")
            break
    assert reached == ["skip", "filter", "summary"]


def ask(address, host=None, **headers):
    request = urllib.request.Request(address, headers={**({"Host": host} if host else {}), **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def test_names_of_others_are_refused_and_nothing_but_get_is_answered(crowd):
    port = crowd.rpartition(":")[2].rstrip("/")
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert ask(f"{crowd}state.json", host)[0] == 200, host
    for host in (
        f"evil.example:{port}",
        "127.0.0.1",
        "localhost:1",
        f"localhost.evil.example:{port}",
        "x@[",
        f"u@127.0.0.1:{port}",
    ):
        status, body, _ = ask(f"{crowd}state.json", host)
        assert (status, b"mounts" in body) == (421, False), host
    for path in ("../ui.py", "page/index.html", "%2e%2e/ui.py", "state.json/x"):
        assert ask(crowd + path)[0] == 404, path
    assert ask(f"{crowd}start?key=x&at=nothing")[0] == 404
    request = urllib.request.Request(f"{crowd}state.json", method="POST", data=b"x")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value:
        assert refused.value.code == 501
    policy = ask(crowd)[2]["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_where_others_can_connect_a_token_is_needed(driver, tmp_path):
    with served(Crowd(), "0.0.0.0", "t0ken-of-the-tests") as server:
        address = f"http://127.0.0.1:{server.port}/"
        for path in (
            "",
            "state.json",
            "page.js",
            "start?key=x&at=1",
            "?token=",
            "?token=t0ken-of-the-test",
            "state.json?token=t0ken-of-the-tests",
        ):
            assert ask(address + path)[0] == 401, path
        assert ask(f"{address}state.json", Cookie="floe-token=other")[0] == 401
        assert ask(f"{address}state.json", Authorization="Bearer t0ken-of-the-tests")[0] == 200
        driver.get(f"{address}?token=t0ken-of-the-tests")
        wait_until(lambda: samples(driver) > 0, 60)
        assert driver.current_url == address  # the token stays in no history
        driver.delete_all_cookies()
    node = Node(tmp_path)
    token = tmp_path / "token"
    for content in ("", "short", "with a space in the midst of it"):
        token.write_text(content)
        assert "holds no token" in node.floe("ui", "--token-file", token, code=2).stderr
    assert "is no IP:PORT" in node.floe("ui", "--listen", "localhost:1", code=2).stderr
    token.write_text("t0ken-of-the-tests\n")
    with ui(node, "--token-file", str(token)) as address:
        assert "token" not in address
        assert ask(address)[0] == 401
    with ui(node, "--listen", "0.0.0.0:0") as address:
        assert "/?token=" in address
        base, _, given = address.replace("0.0.0.0", "127.0.0.1").partition("?token=")
        assert ask(base)[0] == 401
        assert ask(base, Authorization=f"Bearer {given}")[0] == 200
    with ui(node) as address:
        assert ask(f"{address}state.json")[0] == 200


def test_what_the_doctor_finds_is_among_the_problems_with_what_mends_it(driver, tmp_path):
    node = Node(tmp_path)
    node.environ["FLOE_TRUSTED_KEYS"] = str(tmp_path / "nobodys.pub")
    with ui(node) as address:
        driver.get(address)
        wait_until(lambda: samples(driver) > 0, 60)  # before the doctor has done
        wait_until(lambda: "nothing can be mounted or pulled lazily" in text(driver, "#problems"), 60)
        found = [one for one in json.loads(ask(f"{address}state.json")[1])["problems"] if "trusted keys" in one["text"]]
        assert [(one["level"], bool(one["mend"])) for one in found] == [("error", True)]


def test_no_secret_is_shown(tmp_path):
    node = Node(tmp_path)
    node.environ |= {"FLOE_INDEX": "redis://:s3cr3t-of-redis@127.0.0.1:1/0", "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-s3"}
    with ui(node) as address:
        wait_until(lambda: b"the index is unreachable" in ask(f"{address}state.json")[1], 60)
        assert b"s3cr3t" not in ask(f"{address}state.json")[1]
