"""Notifications: who is told of what, once, by Slack, SNS and e-mail, and what happens when that fails."""

import json
import os
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from aws_server import ACCOUNT_ID
from builders import SAVED_FILES, instance, save_fleet, save_policy
from conftest import TAGCHECK, clean_environment, script_with
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.ses.models import ses_backends
from moto.sns.models import sns_backends

import tagcheck as script

REGION, OTHER = "us-east-1", "eu-west-1"
TOPIC = f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:tags"
SECRET = "T0SECRET/B0SECRET/xSECRETx"


class Slack:
    """An incoming webhook over TLS; the next answers can be other than 200 ok."""

    def __init__(self, directory):
        self.texts, self.answers, self.hang, self.trickle = [], [], 0.0, 0.0
        self.ended = threading.Event()
        slack = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for byte in b"HTTP/1.1 200 OK\r\n" * 9 if slack.trickle else b"":
                    time.sleep(slack.trickle)
                    self.wfile.write(bytes([byte]))
                slack.ended.wait(slack.hang)
                status, headers = slack.answers.pop(0) if slack.answers else (200, {})
                if status == 200:
                    slack.texts.append(json.loads(body)["text"])
                said = b"ok" if status == 200 else f"no_{self.path}".encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(said))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said)

            def do_GET(self):
                slack.texts.append("followed")

            def log_message(self, *_):
                pass

        self.certificate = directory / "ca.pem"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # of callers that did not wait
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.make_certificate())
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.host = f"localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def make_certificate(self):
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=9))
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.certificate.write_bytes(private + public)
        return self.certificate

    @property
    def env(self):
        return {"HOOK": f"https://{self.host}/services/{SECRET}", "SSL_CERT_FILE": str(self.certificate)}


@pytest.fixture
def slack(tmp_path):
    server = Slack(tmp_path)
    yield server
    server.ended.set()
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def scan(tagcheck, tmp_path):
    """Give a function that scans saved instances under a policy that notifies."""

    def run(notify, fleet, *args, policy=(), regions=(REGION,), **options):
        keys = {"required_tags": ["Owner", "Project"], "notify": notify, "regions": dict.fromkeys(regions)}
        save_policy(tmp_path, **keys | dict(policy))
        save_fleet(tmp_path, *(instance(number, tags) for number, tags in enumerate(fleet)))
        result = tagcheck("scan", *SAVED_FILES, "--json", "out.json", *args, **options)
        for text in (result.out, result.err, (tmp_path / "out.json").read_text() if result.code != 2 else ""):
            assert "SECRET" not in text
        return result

    return run


def by_slack(slack, **more):
    return {"slack": {"webhook_url_env": "HOOK", "allow_hosts": [slack.host]}, **more}


GOOD = {"Owner": "ann", "Project": "shop"}


def test_slack_is_told_of_what_is_new_once(scan, slack):
    notify, env = by_slack(slack), {"env": slack.env}
    scan(notify, [{"Name": "web-1"}, GOOD], **env, check=3)
    (text,) = slack.texts
    assert text.startswith("tagcheck test: 1 new finding\n")
    assert "1 of 1 target read, 2 instances, 1 compliant" in text
    assert f"NEW i-{0:017x} (web-1) in {ACCOUNT_ID} {REGION}: Owner missing, Project missing" in text
    scan(notify, [{"Name": "web-1"}, GOOD], **env, check=3)
    assert len(slack.texts) == 1
    scan(notify, [{"Name": "web-1"}, {"Owner": "ann"}], **env, check=3)
    assert f"NEW i-{1:017x} in" in slack.texts[1]
    assert "web-1" not in slack.texts[1]
    assert "; owner ann" in slack.texts[1]
    scan(notify, [GOOD, GOOD], **env, check=0)
    scan(notify, [{"Name": "web-1"}, GOOD], **env, check=3)
    assert "REOPENED" in slack.texts[2]
    assert len(slack.texts) == 3


def test_on_any_tells_of_what_is_open_with_each_scan(scan, slack):
    for _ in range(2):
        scan(by_slack(slack, on="any"), [{}], env=slack.env, check=3)
    assert [text.splitlines()[0] for text in slack.texts] == ["tagcheck test: 1 open finding"] * 2
    scan(by_slack(slack, on="any"), [GOOD], env=slack.env, check=0)
    assert len(slack.texts) == 2


def test_a_dry_run_tells_nobody_and_needs_no_webhook(scan, slack):
    scan(by_slack(slack), [{}], "--dry-run", check=3)
    assert slack.texts == []


def test_gaps_and_ends_of_exemptions_are_told_once(scan, slack):
    soon = (datetime.now(UTC) + timedelta(days=5)).date().isoformat()
    exempt = {"exemptions": [{"reason": "old <platform>", "tags": {"Name": "old-*"}, "expires": soon}]}
    for _ in range(2):
        scan(by_slack(slack), [GOOD], policy=exempt, regions=(REGION, OTHER), env=slack.env, check=4)
    (text,) = slack.texts
    assert text.startswith("tagcheck test: 1 target not read, 1 exemption ends soon")
    assert f"{ACCOUNT_ID} {OTHER}:\n  NotInFiles" in text
    assert "exemptions[0] (old &lt;platform&gt;): ends on" in text


def test_an_account_that_cannot_be_read_is_told_again_after_it_could(tmp_path):
    policy_file, state = tmp_path / "policy.yaml", tmp_path / "state.db"
    policy_file.write_text(
        "version: 1\nname: test\nrequired_tags: [Owner]\nregions: {us-east-1: }\n"
        "notify: {slack: {webhook_url_env: HOOK}}\n"
    )
    policy, now = script.load_policy(str(policy_file)), datetime(2026, 3, 1, tzinfo=UTC)
    subject = f"unread {ACCOUNT_ID} *"
    script.check_state(state)

    def pending(region):
        with closing(script.open_sightings()) as db:
            scan = script.Scan(str(uuid.uuid4()), policy, now)
            target = script.add_target(db, script.Target(ACCOUNT_ID, region))
            if region == "*":
                script.fail_target(db, target, script.TargetError("AccessDenied", "no"))
            with script.record_scan(db, state, scan, now, str(state)):
                script.queue_notifications(db, scan, ())
                return script.fetch_pending(db, "test", subject)

    assert pending("*") == {"slack"}
    with closing(script.open_sightings()) as db:
        script.add_digest_lines(db, [script.DigestLine("slack", "", subject)])
        script.record_sent(db, script.LocalState(state), "test", "slack", now)
    assert pending("*") == set()
    assert pending(REGION) == set()
    assert pending("*") == {"slack"}


def test_tags_ping_nobody_and_what_is_cut_is_counted(scan, slack):
    hostile = {"Name": "<!channel> `x` <https://x|y> & \u202e", "owner": "<@U0123456>"}
    scan(by_slack(slack), [hostile, *[{"Name": "n" * 256}] * 29], env=slack.env, check=3)
    (text,) = slack.texts
    assert "&lt;!channel&gt; 'x' &lt;https://x|y&gt;" in text
    assert "<" not in text
    assert "\u202e" not in text
    assert "… and 20 more" in text
    assert len(text) < 40_000


@pytest.mark.parametrize(
    ("answers", "said"),
    {
        "failing for ever": ([(500, {})] * 9, "Slack answered 500"),
        "throttling for too long": ([(429, {"Retry-After": "3600"})], "Slack answered 429"),
        "a redirect": ([(302, {"Location": "/elsewhere"})], "a redirect, which is not followed"),
        "gone": ([(410, {})], "Slack answered 410"),
    }.values(),
)
def test_a_slack_that_fails_is_said_and_told_by_the_next_scan(scan, slack, tmp_path, answers, said):
    hasty = script_with(tmp_path, SLACK_PAUSES=(0.01, 0.01))
    slack.answers = list(answers)
    result = scan(by_slack(slack), [{}], env=slack.env, script=hasty, check=5)
    assert said in result.err
    assert "the scan is recorded" in result.err
    assert len(result.csv("violators.csv")) == 1
    assert slack.texts == []
    slack.answers = []
    scan(by_slack(slack), [{}, {}], env=slack.env, check=3)
    (text,) = slack.texts
    assert text.startswith("tagcheck test: 2 new findings")
    assert result.json("out.json")["findings"][0]["times_seen"] == 2


@pytest.mark.parametrize("args", [(), ("-v",)])
@pytest.mark.parametrize("answers", [[(500, {})], [(429, {"Retry-After": "0"})]])
def test_a_slack_that_fails_for_a_moment_is_tried_again(scan, slack, tmp_path, answers, args):
    slack.answers = list(answers)
    hasty = script_with(tmp_path, SLACK_PAUSES=(0.01,))
    result = scan(by_slack(slack), [{}], *args, env=slack.env, script=hasty, check=3)
    assert len(slack.texts) == 1
    assert ("trying again" in result.err) is bool(args)


def test_a_slack_that_hangs_costs_a_time_out(scan, slack, tmp_path):
    slack.hang = 30.0
    begun = time.monotonic()
    impatient = script_with(tmp_path, SLACK_SECONDS=0.3)
    result = scan(by_slack(slack), [{}], env=slack.env, script=impatient, check=5, process=True)
    assert "did not answer within" in result.err
    assert time.monotonic() - begun < 30


def test_a_slack_that_trickles_costs_a_time_out(scan, slack, tmp_path):
    slack.trickle = 0.1
    impatient = script_with(tmp_path, SLACK_SECONDS=0.5)
    result = scan(by_slack(slack), [{}], env=slack.env, script=impatient, check=5, process=True)
    assert "did not answer within" in result.err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, "put the webhook's URL into the environment variable HOOK"),
        (f"file:///etc/{SECRET}", "does not hold the https:// URL"),
        (f"http://hooks.slack.com/services/{SECRET}", "does not hold the https:// URL"),
        (f"https://example.com/services/{SECRET}", "another host than hooks.slack.com"),
        (f"https://hooks.slack.com@example.com/{SECRET}", "another host"),
        (f"https://hooks.slack.com/services/{SECRET} x", "does not hold the https:// URL"),
    ],
)
def test_a_webhook_that_is_none_is_refused_before_anything_is_read(scan, tmp_path, url, said):
    env = {"HOOK": url} if url else {}
    result = scan({"slack": {"webhook_url_env": "HOOK"}}, [{}], env=env, check=2)
    assert said in result.err
    assert not (tmp_path / "violators.csv").exists()


def test_a_slack_whose_certificate_nobody_knows_is_not_told(scan, slack):
    result = scan(by_slack(slack), [{}], env={"HOOK": slack.env["HOOK"]}, check=5)
    assert "cannot reach Slack" in result.err
    assert slack.texts == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_while_reports_are_written_leaves_the_messages_to_the_next_scan(scan, slack, tmp_path, number):
    scan(by_slack(slack), [GOOD, GOOD], env=slack.env, check=0)
    save_fleet(tmp_path, instance(0), instance(1))
    (tmp_path / "violators.csv").unlink()
    os.mkfifo(tmp_path / "violators.csv")
    (tmp_path / "out.json").unlink()
    process = subprocess.Popen(
        [sys.executable, TAGCHECK, "scan", *SAVED_FILES, "--json", "out.json"],
        cwd=tmp_path, env=clean_environment(tmp_path) | slack.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "out.json").exists():
        assert time.monotonic() < end, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)  # the JSON is written, and the CSV waits for its reader
    rows = (tmp_path / "violators.csv").read_text().splitlines()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(rows), slack.texts) == (5, 3, [])
    said = "the scan is recorded and its outputs are written, but not every notification was sent"
    assert err.endswith(f"tagcheck: {said}; the next scan tries again: slack: interrupted\n")
    (tmp_path / "violators.csv").unlink()
    result = scan(by_slack(slack), [{}, {}], env=slack.env, check=3)
    assert [found["status"] for found in result.json("out.json")["findings"]] == ["REPEAT"] * 2
    assert slack.texts[0].startswith("tagcheck test: 2 new findings")


def published():
    return [message[1] for message in sns_backends[ACCOUNT_ID][REGION].topics[TOPIC].sent_notifications]


def test_sns_is_told_and_after_a_failure_by_the_next_scan(scan, aws, tmp_path):
    aws.backstage("sns", REGION).create_topic(Name="tags")
    denied = aws.fault("error", service="sns", code="AuthorizationError", status=403, message="no")
    result = scan({"sns": {"topic_arn": TOPIC}}, [{"Name": "wéb\nx"}], env=aws.env, check=5)
    assert "AuthorizationError" in result.err
    assert published() == []
    denied.times = 0
    for _ in range(2):
        scan({"sns": {"topic_arn": TOPIC}}, [{"Name": "wéb\nx"}], env=aws.env, check=3)
    (text,) = published()
    assert "(wéb\\nx)" in text
    with closing(sqlite3.connect(tmp_path / "instance_state.db")) as db:
        assert db.execute("SELECT count(*) FROM notifications WHERE told_at IS NULL").fetchone() == (0,)


def test_one_channel_that_fails_is_told_later_and_the_other_not_again(scan, aws, slack):
    aws.backstage("sns", REGION).create_topic(Name="tags")
    slack.answers = [(400, {})]
    notify = by_slack(slack, sns={"topic_arn": TOPIC})
    result = scan(notify, [{}], env=aws.env | slack.env, check=5)
    assert "Messages sent: slack 0, sns 1\ntagcheck: the scan is recorded" in result.err
    assert (len(slack.texts), len(published())) == (0, 1)
    assert scan(notify, [{}], "--quiet", env=aws.env | slack.env, check=3).err == ""
    assert (len(slack.texts), len(published())) == (1, 1)


def sent():
    return {
        tuple(message.destinations["ToAddresses"]): message.body
        for message in ses_backends[ACCOUNT_ID][REGION].sent_messages
    }


def test_each_owner_gets_what_is_theirs(scan, aws, slack):
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    owners = {"mapping": {"team-web": "web@example.com", "Bob": "U012ABCDEF"}, "domains": ["example.com"]}
    notify = by_slack(
        slack,
        email={"from": "tags@example.com", "to": ["ops@example.com"], "region": REGION},
        owners=owners | {"default": "lost@example.com"},
    )
    fleet = [
        {"Owner": "team-web"},
        {"Owner": "ann@example.com"},
        {"Owner": "bob"},
        {"Owner": "eve@evil.org"},
        {},
        GOOD,
    ]
    result = scan(notify, fleet, env=aws.env | slack.env, check=3)
    assert result.err.splitlines()[-1] == "Messages sent: slack 1, email 1, owners 4"
    mails = sent()
    assert set(mails) == {(f"{who}@example.com",) for who in ("ops", "web", "ann", "lost")}
    theirs = {
        who[0].partition("@")[0]: [n for n in range(6) if f"i-{n:017x}" in text]
        for who, text in mails.items()
    }
    assert theirs == {"ops": [0, 1, 2, 3, 4], "web": [0], "ann": [1], "lost": [3, 4]}
    everything, to_bob = slack.texts
    assert f"i-{0:017x}" in everything
    assert to_bob.startswith("<@U012ABCDEF> tagcheck test: 1 new finding")
    assert f"i-{2:017x}" in to_bob
    assert f"i-{0:017x}" not in to_bob
    again = scan(notify, fleet, env=aws.env | slack.env, check=3)
    assert "Messages sent: slack 0, email 0, owners 0\n" in again.err
    assert (len(sent()), len(slack.texts)) == (4, 2)


def test_only_an_owner_whose_email_is_rejected_gets_it_from_the_next_scan(scan, aws):
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    notify = {
        "email": {"from": "tags@example.com", "region": REGION},
        "owners": {"domains": ["example.com"]},
    }
    fleet = [{"Owner": f"{who}@example.com"} for who in ("ann", "bob", "cyd")]
    rejected = aws.fault("error", service="sesv2", code="MessageRejected", status=400, message="no", times=1)
    result = scan(notify, fleet, env=aws.env, check=5)
    assert "ann@example.com: MessageRejected" in result.err
    assert "bob" not in result.err
    assert sent().keys() == {("bob@example.com",), ("cyd@example.com",)}
    rejected.times = 0
    scan(notify, fleet, env=aws.env, check=3)
    assert [mail[0][:3] for mail in sent()] == ["bob", "cyd", "ann"]


def test_iam_policy_lists_what_notifying_needs(tagcheck, tmp_path):
    notify = {"sns": {"topic_arn": TOPIC}, "email": {"from": "tags@example.com", "to": ["ops@example.com"]}}
    save_policy(tmp_path, notify=notify)
    statements = json.loads(tagcheck("iam-policy", "--policy", "policy.yaml", check=0).out)["scan"][
        "Statement"
    ]
    actions = {action: statement for statement in statements for action in statement["Action"]}
    assert actions["sns:Publish"]["Resource"] == TOPIC
    assert actions["ses:SendEmail"]["Condition"] == {"StringEquals": {"ses:FromAddress": "tags@example.com"}}


def test_a_million_findings_do_not_make_a_long_digest():
    lines = [f"line {number} " + "x" * 300 for number in range(100)]
    section = script.Section("Findings:", lines, 1_000_000)
    digest = script.Digest("slack", "", "t", [section])
    assert len(script.digest_text(digest)) < 3_200
    assert "… and 999,991 more" in script.digest_text(digest)


def test_an_owner_gets_the_first_hundred_findings_and_the_number_of_the_others(scan, aws):
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    notify = {
        "email": {"from": "tags@example.com", "region": REGION},
        "owners": {"mapping": {"ann": "ann@example.com"}},
    }
    scan(notify, [{"Owner": "ann"}] * 130, env=aws.env, check=3)
    text = sent()[("ann@example.com",)]
    assert text.count("Project missing") == 100
    assert "… and 30 more" in text


@pytest.fixture
def signals():
    """Put back how the process reacts to signals: a scan changes it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("reminded", [False, True])
def test_the_memory_that_digests_take_does_not_grow_with_findings(monkeypatch, tmp_path, reminded):
    monkeypatch.chdir(tmp_path)
    target, launched, mails = script.Target(ACCOUNT_ID, REGION), datetime(2026, 1, 1, tzinfo=UTC), Counter()
    email = {"from": "tags@example.com", "to": ["ops@example.com"], "region": REGION}
    keys = {"version": 1, "name": "test", "required_tags": ["Project"], "regions": {REGION: None}}
    keys |= {"notify": {"email": email, "owners": {"domains": ["example.com"]}, "reminders": ["7d"]}}
    Path("policy.yaml").write_text(json.dumps(keys))
    monkeypatch.setattr(script, "Aws", lambda *_, **__: SimpleNamespace(client=lambda *_: None))
    monkeypatch.setattr(script, "send_email", lambda *_: mails.update(["sent"]))

    def owned(n):
        return script.Instance(f"i-{n:017x}", "running", launched, {"Owner": f"owner-{n}@example.com"})

    def peak(number):
        def readings(*_):
            for first in range(0, number, 500):
                yield target, [owned(n) for n in range(first, first + 500)]
            yield target, None

        monkeypatch.setattr(script, "read_saved", readings)
        Path("instance_state.db").unlink(missing_ok=True)
        args = ["scan", "--quiet", "--policy", "policy.yaml", "--instances", "none"]
        if reminded:
            script.main(args, BEGUN)
        mails.clear()
        tracemalloc.start()
        try:
            assert script.main(args, BEGUN + 8 * DAY) == 3
            assert mails["sent"] == number + 1
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    _, few, many = peak(500), peak(1_000), peak(6_000)  # the first imports modules
    assert many < few + 300_000, f"{few:,} bytes for 1,000 findings, {many:,} for 6,000"


# ---- What a digest looks like ------------------------------------------------------------------------------

DASHBOARD = "https://ci.example.com/tags.html?job=a&ref=b"
DAY = timedelta(days=1)
BEGUN = datetime(2026, 11, 1, 6, tzinfo=UTC)


def sections(text):
    """Give the lines of each section of a text for Slack, by its title."""
    parts = text.split("```")
    return {
        before.strip().rpartition("\n")[2]: part.strip().splitlines()
        for before, part in zip(parts[::2], parts[1::2], strict=False)
    }


def test_causes_stand_before_what_is_new(scan, slack):
    fleet = [{"aws:autoscaling:groupName": "web"}] * 3
    scan(by_slack(slack), fleet, env=slack.env, check=3)
    titles = [*sections(slack.texts[0])]
    assert titles[1:] == ["Fix many at once:", "New findings:"]
    assert sections(slack.texts[0])["Fix many at once:"][0].startswith("1 Auto Scaling group: 3 instances")


def test_likely_values_have_one_form(scan, slack):
    sure = [{"aws:autoscaling:groupName": "web", "Owner": "team-web", "Project": "shop"}] * 40
    unsure = [{"aws:autoscaling:groupName": "api", "Owner": o, "Project": "p"} for o in ("a", "a", "a", "b")]
    lacking = [{"aws:autoscaling:groupName": name, "Project": "p"} for name in ("web", "api")]
    scan(by_slack(slack), [*lacking, *sure, *unsure], env=slack.env, check=3)
    lines = sections(slack.texts[0])["New findings:"]
    assert [line.partition("Owner missing")[2] for line in lines] == [" (team-web?)", " (maybe a?)"]
    assert "perhaps" not in slack.texts[0]


@pytest.mark.parametrize("name", ["n" * 256, "<!channel> ` \u202e " * 12, "a\nb " * 60])
def test_no_line_is_longer_than_100_characters(scan, aws, slack, name):
    aws.backstage("sns", REGION).create_topic(Name="tags")
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    tags = [f"{name[:20]}{number}".replace("\n", "") for number in range(12)]
    fleet = [{"Name": name, "Owner": name, "aws:autoscaling:groupName": name}] * 12
    exempt = {"reason": name.replace("\n", " ")[:200], "tags": {"Name": "x"}, "expires": "2020-01-01"}
    policy = {"required_tags": [*tags, "k" * 127], "exemptions": [exempt]} if "\u202e" not in name else {}
    email = {"from": "tags@example.com", "to": ["ops@example.com"], "region": REGION}
    owners = {"default": "lost@example.com"}
    notify = by_slack(slack, sns={"topic_arn": TOPIC}, email=email, owners=owners)
    scan(notify, fleet, policy=policy, regions=(REGION, OTHER), env=aws.env | slack.env, check=4)
    texts = [*slack.texts, *published(), *sent().values()]
    assert len(texts) == 4
    for text in texts:
        title, *lines = text.splitlines()
        assert title.startswith("tagcheck test: 12 new findings") or text in sent().values()
        shown = [line.replace("&lt;", "<").replace("&gt;", ">") for line in lines]
        assert max(map(len, shown)) <= 100
        assert "\u202e" not in text
        assert "a\nb" not in text
        escaped = f"({name[:4].encode('unicode_escape').decode()}"
        assert escaped.replace("<", "&lt;" if text in slack.texts else "<") in text
    assert "<" not in slack.texts[0]
    assert slack.texts[0].count("`") % 6 == 0  # only those of code blocks, in pairs


def test_a_hostile_account_name_and_owner_ping_nobody(scan, slack, aws):
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    hostile = "<!channel> ``` \\u202e\\n<@U0123456>"
    names = {ACCOUNT_ID: "<!here> ``` *x*"}
    accounts = {"role_name": "r", "ids": [ACCOUNT_ID], "names": names}
    notify = by_slack(slack, owners={"default": "U012ABCDEF"}, dashboard_url=DASHBOARD)
    scan(
        notify, [{"Owner": json.loads(f'"{hostile}"')}], policy={"accounts": accounts}, env=slack.env, check=3
    )
    for text in slack.texts:
        assert f"{ACCOUNT_ID} (&lt;!here&gt; ''' *x*) {REGION}" in text
        unlinked = text.replace("<@U012ABCDEF> tagcheck", "").replace("<https://", "")
        assert "<" not in unlinked
        assert "\u202e" not in text
        assert text.count("```") == 2 * (2 if text.startswith("<@") is False else 1)
    assert "(owner &lt;!channel&gt; ''' \\u202e\\n&lt;@U0123456&gt;)\n" in slack.texts[1]


@pytest.mark.parametrize(
    ("days", "said"),
    [
        ((5,), "1 exemption ends soon"),
        ((-5,), "1 exemption has ended"),
        ((5, 0, -5, -9), "2 exemptions end soon, 2 exemptions have ended"),
    ],
)
def test_an_exemption_ends_soon_or_has_ended(scan, slack, days, said):
    expires = [(BEGUN + day * DAY).date().isoformat() for day in days]
    exempt = [{"reason": "old", "tags": {"Name": "old"}, "expires": day} for day in expires]
    scan(by_slack(slack), [GOOD], policy={"exemptions": exempt}, env=slack.env, now=BEGUN, check=0)
    assert slack.texts[0].splitlines()[0] == f"tagcheck test: {said}"


def test_digests_link_to_the_dashboard_and_an_owners_to_its_section(scan, aws, slack):
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    owners = {"mapping": {"team web": "U012ABCDEF", "ann": "ann@example.com", "bob": "ann@example.com"}}
    email = {"from": "tags@example.com", "to": ["ops@example.com"], "region": REGION}
    notify = by_slack(slack, email=email, owners=owners, dashboard_url=DASHBOARD)
    fleet = [{"Owner": "team web"}, {"Owner": "ann"}, {"Owner": "bob"}]
    scan(notify, fleet, env=aws.env | slack.env, check=3)
    everything, to_web = slack.texts
    escaped = DASHBOARD.replace("&", "&amp;")
    assert everything.endswith(f"\n<{escaped}|Open the dashboard>")
    assert to_web.endswith(f"\n<{escaped}#{script.owner_anchor('team web')}|Open the dashboard>")
    assert sent()[("ops@example.com",)].endswith(f"\n\nDashboard: {DASHBOARD}\n")
    assert sent()[("ann@example.com",)].endswith(f"\n\nDashboard: {DASHBOARD}\n")  # it has two owners


def test_an_owners_digest_does_not_repeat_the_owner(scan, aws, slack):
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    owners = {"mapping": {"web": "U012ABCDEF", "ann": "ann@example.com", "bob": "ann@example.com"}}
    email = {"from": "tags@example.com", "region": REGION}
    fleet = [{"Owner": "web"}, {"Owner": "web"}, {"Owner": "ann"}, {"Owner": "bob"}]
    scan(by_slack(slack, email=email, owners=owners), fleet, env=aws.env | slack.env, check=3)
    assert slack.texts[0].count("owner web") == 2  # everybody's
    assert slack.texts[1].splitlines()[0] == "<@U012ABCDEF> tagcheck test: 2 new findings (owner web)"
    assert slack.texts[1].count("web") == 1
    (mail,) = sent().values()
    assert (mail.count("owner ann"), mail.count("owner bob")) == (1, 1)


def test_no_two_owners_share_an_anchor():
    owners = [
        "team-web",
        "Team-Web",
        "team web",
        "team_web",
        "",
        "\u202e",
        "é" * 300,
        "\ud800",
        'a"><b>',
        "a" * 256,
    ]
    anchors = [*map(script.owner_anchor, owners)]
    assert len({*anchors}) == len(owners)
    for anchor in anchors:
        assert anchor.startswith("owner-")
        assert {*anchor} <= {*"abcdefghijklmnopqrstuvwxyz0123456789-"}
        assert len(anchor) < 60


def test_the_subject_of_sns_is_cut_between_its_parts(scan, aws):
    aws.backstage("sns", REGION).create_topic(Name="tags")
    exempt = [
        {"reason": "old", "tags": {"Name": "x"}, "expires": (BEGUN + day * DAY).date().isoformat()}
        for day in (-5, 5)
    ]
    policy = {"name": "ünïcode " * 5, "exemptions": exempt}
    regions = (REGION, OTHER)
    scan({"sns": {"topic_arn": TOPIC}}, [{}], policy=policy, regions=regions, env=aws.env, now=BEGUN, check=4)
    (message,) = sns_backends[ACCOUNT_ID][REGION].topics[TOPIC].sent_notifications
    subject = message[2]
    assert subject.isascii()
    assert len(subject) < 100
    assert subject.endswith(": 1 new finding, 1 target not read, ...")
    title, *_ = message[1].split("\n\n")
    assert max(map(len, title.splitlines())) <= 100
    assert title.endswith("1 exemption has ended")


# ---- Reminders ---------------------------------------------------------------------------------------------


@pytest.fixture
def month(scan, slack):
    """Give a function that scans on a day of a month, and gives what Slack was sent."""

    def run(day, fleet=({},), reminders=("7d", "30d"), check=3, **more):
        slack.texts.clear()
        notify = by_slack(slack, reminders=list(reminders)) if reminders else by_slack(slack)
        result = scan(notify | more, fleet, env=slack.env, now=BEGUN + day * DAY)
        assert result.code == check
        return slack.texts[:]

    return run


def test_a_finding_still_open_is_told_once_more_at_each_age(month):
    told = {day: month(day) for day in (0, 1, 6.99, 7, 8, 29, 30, 31, 300)}
    assert [day for day, texts in told.items() if texts] == [0, 7, 30]
    assert told[0][0].startswith("tagcheck test: 1 new finding\n")
    assert told[7][0].startswith("tagcheck test: 1 still open after 7 days\n")
    assert sections(told[7][0])["Still open after 7 days:"] == [
        f"i-{0:017x} in {ACCOUNT_ID} {REGION} since 2026-11-01: Owner missing, Project missing"
    ]
    assert told[30][0].startswith("tagcheck test: 1 still open after 30 days\n")
    assert [*sections(told[30][0])][1:] == ["Still open after 30 days:"]


def test_rare_scans_send_one_reminder(month):
    assert month(0)
    (text,) = month(40)
    assert text.startswith("tagcheck test: 1 still open after 30 days\n")
    assert month(41) == []
    assert month(42, reminders=["7d"]) == []  # a longer age was told already


def test_what_is_new_and_what_is_still_open_stand_in_sections_of_their_own(month):
    month(0, [{}])
    month(25, [{}, {}], reminders=())
    (text,) = month(35, [{}] * 3)
    assert text.startswith(
        "tagcheck test: 1 new finding, 1 still open after 7 days, 1 still open after 30 days\n"
    )
    assert [*sections(text)][1:] == ["New findings:", "Still open after 7 days:", "Still open after 30 days:"]
    assert [lines[0].partition("i-")[2][16] for lines in [*sections(text).values()][1:]] == ["2", "1", "0"]


def test_an_age_counts_from_when_a_finding_was_reopened(month):
    month(0)
    month(5, [GOOD], check=0)
    (text,) = month(9)
    assert "REOPENED" in text
    assert "Still open" not in text
    assert month(15) == []
    (text,) = month(16)
    assert "since 2026-11-10:" in text
    assert month(17) == []


def test_a_finding_that_is_resolved_forgets_its_reminders(month):
    assert [bool(month(day)) for day in (0, 7, 8)] == [True, True, False]
    month(10, [GOOD], check=0)
    assert [bool(month(day)) for day in (11, 17, 18, 19)] == [True, False, True, False]


def test_a_reminder_that_failed_is_sent_by_the_next_scan(month, slack):
    month(0)
    slack.answers = [(400, {})]
    assert month(7, check=5) == []
    (text,) = month(8)
    assert text.startswith("tagcheck test: 1 still open after 7 days\n")
    slack.answers = [(400, {})]
    month(30, check=5)
    (text,) = month(31)
    assert text.startswith("tagcheck test: 1 still open after 30 days\n")
    assert month(32) == []


def test_a_policy_that_adds_reminders_sends_one_for_what_is_older(month):
    for day in (0, 20):
        month(day, [{}] * 15, reminders=())
    (text,) = month(21, [{}] * 15)
    assert text.startswith("tagcheck test: 15 still open after 7 days\n")
    assert "… and 5 more" in text
    assert month(22, [{}] * 15) == []
    assert month(23, [{}] * 15, reminders=["7d", "20d"]) == []  # it was told at a greater age


def test_what_was_open_before_anybody_was_notified_is_told_at_the_first_reminder(month, tagcheck, tmp_path):
    save_policy(tmp_path, required_tags=["Owner", "Project"])
    save_fleet(tmp_path, instance(0))
    tagcheck("scan", *SAVED_FILES, now=BEGUN, check=3)
    assert month(3) == []
    assert month(7)[0].startswith("tagcheck test: 1 still open after 7 days\n")
    assert month(8) == []


def test_reminders_stand_apart_where_all_that_is_open_is_told(month):
    month(0, on="any")
    (text,) = month(7, on="any")
    assert text.startswith("tagcheck test: 1 still open after 7 days\n")
    (text,) = month(8, on="any")
    assert text.startswith("tagcheck test: 1 open finding\n")


def test_what_could_not_be_read_is_not_reminded_of(month, scan, slack):
    month(0)
    notify = by_slack(slack, reminders=["7d"])
    scan(notify, [{}], regions=(OTHER,), env=slack.env, now=BEGUN + 8 * DAY, check=4)
    assert slack.texts[1].startswith("tagcheck test: 1 target not read\n")
    assert month(9)[0].startswith("tagcheck test: 1 still open after 7 days\n")


def test_each_channel_and_owner_is_reminded(scan, aws, slack):
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    notify = by_slack(
        slack,
        email={"from": "tags@example.com", "region": REGION},
        owners={"domains": ["example.com"]},
        reminders=["1w"],
    )
    fleet, env = [{"Owner": "ann@example.com"}], aws.env | slack.env
    for day in (0, 3, 7, 8):
        scan(notify, fleet, env=env, now=BEGUN + day * DAY, check=3)
    assert len(slack.texts) == 2
    mails = [message.body for message in ses_backends[ACCOUNT_ID][REGION].sent_messages]
    assert len(mails) == 2
    assert "Still open after 7 days:" in mails[1]


# ---- notify --test -----------------------------------------------------------------------------------------


def saved(directory):
    """Give what is in a directory, with the content."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_notify_sends_a_marked_sample_to_every_channel_and_records_nothing(tagcheck, aws, slack, tmp_path):
    aws.backstage("sns", REGION).create_topic(Name="tags")
    aws.backstage("ses", REGION).verify_email_identity(EmailAddress="tags@example.com")
    email = {"from": "tags@example.com", "to": ["ops@example.com", "sec@example.com"], "region": REGION}
    owners = {"mapping": {"web": "U012ABCDEF"}, "domains": ["example.com"], "default": "lost@example.com"}
    channels = by_slack(slack, sns={"topic_arn": TOPIC}, email=email, owners=owners)
    save_policy(tmp_path, notify=channels | {"dashboard_url": DASHBOARD})
    before = saved(tmp_path)
    result = tagcheck("notify", "--policy", "policy.yaml", "--test", env=aws.env | slack.env, check=0)
    assert result.lines == [
        "slack: sent",
        "sns: sent",
        "email: sent",
        "owners lost@example.com: sent",
        "owners U012ABCDEF: would get the findings of web, not sent",
        "owners …@example.com: would get their own findings, not sent",
    ]
    assert saved(tmp_path) == before
    mails = sent()
    assert set(mails) == {("ops@example.com", "sec@example.com"), ("lost@example.com",)}
    texts = [*slack.texts, *published(), *mails.values()]
    assert len(texts) == 4
    for text in texts:
        assert "This is a test from tagcheck 1.0, nothing was scanned" in text
        assert DASHBOARD.replace("&", "&amp;" if text in slack.texts else "&") in text
    assert slack.texts[0].startswith("tagcheck test: this is a test\n")


def test_notify_says_which_channel_failed_and_tries_the_others(tagcheck, aws, slack, tmp_path):
    aws.backstage("sns", REGION).create_topic(Name="tags")
    aws.fault("error", service="sns", code="AuthorizationError", status=403, message="no")
    slack.answers = [(410, {})]
    save_policy(tmp_path, notify=by_slack(slack, sns={"topic_arn": TOPIC}))
    result = tagcheck("notify", "--policy", "policy.yaml", "--test", env=aws.env | slack.env, check=5)
    assert result.lines[0] == "slack: failed: Slack answered 410"
    assert result.lines[1].startswith("sns: failed: AuthorizationError: ")
    assert "SECRET" not in result.out + result.err
    result = tagcheck("notify", "--policy", "policy.yaml", "--test", env=aws.env, check=5)
    assert "slack: failed: the policy notifies Slack: put the webhook's URL into" in result.out
    assert slack.texts == []


def test_notify_needs_test_and_a_policy_that_notifies(tagcheck, slack, tmp_path):
    save_policy(tmp_path, notify=by_slack(slack))
    result = tagcheck("notify", "--policy", "policy.yaml", env=slack.env, check=2)
    assert "notify sends a marked sample to every channel of the policy: give --test to do so" in result.err
    save_policy(tmp_path)
    result = tagcheck("notify", "--policy", "policy.yaml", "--test", env=slack.env, check=2)
    assert result.err == "tagcheck: policy.yaml has no notify: nobody is notified\n"
    assert slack.texts == []
