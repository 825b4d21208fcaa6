//! Tests of [`super`] and of the client, over a real unix socket with a site that exists only in memory.

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

use super::*;
use crate::control::fake::{FakeDaemon, FakeSite, name};
use crate::control::{ClientError, ControlClient, Phase, Reclaim, RelocateRequest, Role};

fn relocation(peer: &str, volume: &str) -> RelocateRequest {
    RelocateRequest {
        peer: name(peer),
        volume: name(volume),
        image: None,
        bulk: true,
        bulk_rate_bytes_per_s: Some(1000),
        take: false,
        overwrite: false,
        timeout_s: Some(90.5),
    }
}

/// One request as curl would send it: status and body.
async fn raw(socket: &Path, method: &str, route: &str, body: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(socket).await.expect("connects");
    let length = body.len();
    let head = format!(
        "{method} {route} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-type: application/x-www-form-urlencoded\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("sent");
    // A server that refuses the head may close before it has read the body.
    let _ = stream.write_all(body.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).expect("text");
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, if body.is_empty() { Value::Null } else { serde_json::from_str(body).expect("JSON") })
}

fn refusal(result: Result<impl std::fmt::Debug, ClientError>) -> ApiError {
    match result {
        Err(ClientError::Refused(error)) => error,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn the_client_gets_what_the_site_says() {
    let daemon = FakeDaemon::start();
    let client = daemon.client();

    let status = client.status().await.expect("status");
    assert_eq!((status.site.as_str(), status.volumes.len(), status.peers.len()), ("site-a", 2, 2));
    assert_eq!(client.volumes().await.expect("volumes").len(), 2);
    let web = client.volume(&name("web-01")).await.expect("web-01");
    assert_eq!((web.role, web.phase, web.hashed_blocks), (Role::Source, Phase::Owned, Some(8192)));

    let add = AddVolume { name: name("x"), image: "/srv/x.raw".into(), again: false };
    assert_eq!(client.add_volume(&add).await.expect("added").image, Path::new("/srv/x.raw"));
    client.remove_volume(&name("x")).await.expect("removed");
    client.pause(&name("db-01")).await.expect("paused");
    client.resume(&name("db-01")).await.expect("resumed");
    client.limit(&name("db-01"), Some(5)).await.expect("limited");
    client.limit(&name("db-01"), None).await.expect("unlimited");
    let kept = client.cancel(&name("db-01"), Cancel::default()).await.expect("cancelled").expect("an answer");
    assert_eq!((kept.discarded_bytes, kept.owner.as_str()), (0, "site-b"));
    let thrown = client.cancel(&name("db-01"), Cancel { discard_writes: true }).await.expect("cancelled");
    assert_eq!(thrown.expect("an answer").discarded_bytes, 3 << 16);
    let reclaimed = client.reclaim(&name("db-01"), Reclaim { epoch: 3 }).await.expect("reclaimed");
    assert_eq!((reclaimed.epoch, reclaimed.lost.len(), reclaimed.lost_bytes), (4, 1, Some(4096 << 16)));
    assert_eq!(reclaimed.fenced, Some(name("site-b")));
    assert_eq!(
        daemon.calls(),
        [
            "add x /srv/x.raw",
            "remove x",
            "pause db-01",
            "resume db-01",
            "limit Some(5) db-01",
            "limit None db-01",
            "cancel db-01",
            "cancel discarding db-01",
            "reclaim 3 db-01"
        ]
    );

    let job = client.prewarm(vec!["/srv/t.raw".into()]).await.expect("begun");
    assert!(!client.prewarm_status(job).await.expect("known").done);
    assert!(client.prewarm_status(job).await.expect("known").done);
    client.store_stats().await.expect("stats");
}

#[tokio::test]
async fn relocations_are_answered_one_by_one() {
    let daemon = FakeDaemon::start();
    let asked = vec![relocation("site-b", "new-1"), relocation("nobody", "new-2"), relocation("site-b", "db-01")];
    let answers = daemon.client().relocate(asked).await.expect("answered");
    let kinds: Vec<_> = answers.iter().map(|answer| answer.error.as_ref().map(|error| error.kind)).collect();
    assert_eq!(kinds, [None, Some(ErrorKind::NotFound), Some(ErrorKind::Conflict)]);
    assert_eq!(answers[1].peer.as_str(), "nobody");

    let body = r#"{"relocations":[{"peer":"site-b","volume":"new-3"}]}"#;
    let (status, _) = raw(&daemon.socket(), "POST", "/v1/relocations", body).await;
    assert_eq!(status, 202);
    let (status, answer) = raw(&daemon.socket(), "POST", "/v1/relocations", body).await;
    assert_eq!((status, &answer["relocations"][0]["error"]["kind"]), (207, &Value::from("conflict")));
    let last = daemon.calls().last().cloned().unwrap_or_default();
    assert!(last.contains("bulk: true") && last.contains("image: None"), "{last}");
}

#[tokio::test]
async fn refusals_keep_their_kind_and_advice() {
    let daemon = FakeDaemon::start();
    let client = daemon.client();
    let error = refusal(client.volume(&name("none")).await);
    assert_eq!((error.kind, error.message.as_str()), (ErrorKind::NotFound, "there is no volume none"));
    assert_eq!(error.to_string(), "there is no volume none; `blockferry status` lists them");
    assert_eq!(refusal(client.cancel(&name("precious"), Cancel::default()).await).kind, ErrorKind::Refused);
    assert_eq!(refusal(client.reclaim(&name("db-01"), Reclaim { epoch: 2 }).await).kind, ErrorKind::Conflict);
    assert_eq!(refusal(client.reclaim(&name("none"), Reclaim { epoch: 2 }).await).kind, ErrorKind::NotFound);
    let add = AddVolume { name: name("web-01"), image: "/x".into(), again: false };
    assert_eq!(refusal(client.add_volume(&add).await).kind, ErrorKind::Conflict);
    assert_eq!(refusal(client.limit(&name("db-01"), Some(0)).await).kind, ErrorKind::Invalid);
    assert_eq!(refusal(client.prewarm_status(JobId(9)).await).kind, ErrorKind::NotFound);
    assert_eq!(refusal(client.relocate(vec![]).await).kind, ErrorKind::Invalid);
}

/// Request, status, kind, and words that the message must have.
#[tokio::test]
async fn bad_requests_are_explained_in_json() {
    let daemon = FakeDaemon::start();
    for (method, route, body, status, kind, words) in [
        ("GET", "/v1/nothing", "", 404, "not_found", "there is no GET /v1/nothing"),
        ("GET", "/", "", 404, "not_found", "there is no GET /"),
        ("PUT", "/v1/status", "", 405, "invalid", "does not take PUT"),
        ("GET", "/v1/volumes/none", "", 404, "not_found", "no volume none"),
        ("GET", "/v1/volumes/..%2fx", "", 400, "invalid", "not a usable name"),
        ("GET", "/v1/volumes/%ff", "", 400, "", ""),
        ("POST", "/v1/volumes", "", 400, "invalid", "the body is not as expected"),
        ("POST", "/v1/volumes", "{\"name\":\"a\"}", 400, "invalid", "missing field `image`"),
        ("POST", "/v1/volumes", "{\"name\":\"a b\",\"image\":\"/x\"}", 400, "invalid", "not a usable name"),
        ("POST", "/v1/volumes", "{\"name\":\"a\",\"image\":\"x\"}", 400, "invalid", "not absolute"),
        ("POST", "/v1/volumes", "{\"name\":\"a\",\"image\":\"/x\",\"z\":1}", 400, "invalid", "unknown field `z`"),
        ("POST", "/v1/relocations", "{\"relocations\":[]}", 400, "invalid", "nothing in relocations"),
        (
            "POST",
            "/v1/relocations",
            "{\"relocations\":[{\"peer\":\"a\",\"volume\":\"b\",\"image\":\"c\"}]}",
            400,
            "invalid",
            "not absolute",
        ),
        (
            "POST",
            "/v1/relocations",
            "{\"relocations\":[{\"peer\":\"a\",\"volume\":\"b\",\"timeout_s\":0}]}",
            400,
            "invalid",
            "timeout_s is no time",
        ),
        (
            "POST",
            "/v1/relocations",
            "{\"relocations\":[{\"peer\":\"a\",\"volume\":\"b\",\"timeout_s\":-1e300}]}",
            400,
            "invalid",
            "timeout_s is no time",
        ),
        ("POST", "/v1/prewarms", "{\"images\":[]}", 400, "invalid", "nothing in images"),
        ("GET", "/v1/prewarms/x", "", 400, "invalid", "is no job"),
        ("POST", "/v1/volumes/db-01/limit", "{\"bytes_per_s\":-1}", 400, "invalid", "not as expected"),
        ("POST", "/v1/volumes/db-01/cancel", "{\"discard\":true}", 400, "invalid", "unknown field `discard`"),
        ("POST", "/v1/volumes/db-01/cancel", "{\"discard_writes\":1}", 400, "invalid", "not as expected"),
        ("POST", "/v1/volumes/db-01/reclaim", "", 400, "invalid", "not as expected"),
        ("POST", "/v1/volumes/db-01/reclaim", "{}", 400, "invalid", "missing field `epoch`"),
    ] {
        if kind.is_empty() {
            // Bytes that are no text never reach a handler; axum answers in plain words.
            let mut stream = UnixStream::connect(daemon.socket()).await.expect("connects");
            let head = format!("{method} {route} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await.expect("sent");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("answered");
            assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
            continue;
        }
        let (got, answer) = raw(&daemon.socket(), method, route, body).await;
        let error = &answer["error"];
        assert_eq!((got, &error["kind"]), (status, &Value::from(kind)), "{method} {route} {body}: {answer}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(words), "{method} {route} {body}: {message}");
        assert!(error["next"].is_string());
    }
    assert!(daemon.calls().is_empty(), "nothing of this may reach the site: {:?}", daemon.calls());
}

#[tokio::test]
async fn large_bodies_are_refused() {
    let daemon = FakeDaemon::start();
    let body = format!("{{\"images\":[\"/{}\"]}}", "x".repeat(MAX_BODY_BYTES));
    let (status, answer) = raw(&daemon.socket(), "POST", "/v1/prewarms", &body).await;
    assert_eq!((status, &answer["error"]["kind"]), (400, &Value::from("invalid")), "{answer}");
}

#[tokio::test]
async fn slow_requests_are_given_up() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.sock");
    let (listener, _file) = ControlSocket::bind(&path).expect("bound").into_parts();
    let app = router(FakeSite::with_volumes(), Bounds::new(Duration::from_millis(20)));
    tokio::spawn(async move { axum::serve(listener, app).await });
    let error = refusal(ControlClient::new(&path).volume(&name("slow")).await);
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("GET /v1/volumes/slow was not answered"), "{error}");
}

/// A site whose changes wait for the sender.
fn gated() -> (Arc<FakeSite>, oneshot::Sender<()>) {
    let site = FakeSite::with_volumes();
    let (open, gate) = oneshot::channel();
    *site.change_gate.lock() = Some(gate);
    (site, open)
}

async fn until(mut holds: impl FnMut() -> bool) {
    let patience = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), patience).await.expect("it comes about");
}

#[tokio::test]
async fn a_change_whose_client_hangs_up_goes_on() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.sock");
    let (site, open) = gated();
    let server = ControlServer::bind(&path).expect("bound");
    tokio::spawn(server.serve(site.clone(), std::future::pending()));
    let mut client = UnixStream::connect(&path).await.expect("connects");
    client.write_all(b"DELETE /v1/volumes/web-01 HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    until(|| site.change_gate.lock().is_none()).await;
    drop(client);
    // Long enough that the server has noticed: it drops what it ran for this client then.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(site.volumes.lock().contains_key(&name("web-01")));
    open.send(()).expect("the removal still waits");
    until(|| !site.volumes.lock().contains_key(&name("web-01"))).await;
}

#[tokio::test]
async fn a_change_that_takes_long_is_said_to_go_on_and_does() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.sock");
    let (listener, _file) = ControlSocket::bind(&path).expect("bound").into_parts();
    let (site, open) = gated();
    let app = router(site.clone(), Bounds::new(Duration::from_millis(20)));
    tokio::spawn(async move { axum::serve(listener, app).await });
    let (status, answer) = raw(&path, "DELETE", "/v1/volumes/web-01", "").await;
    assert_eq!((status, &answer["error"]["kind"]), (503, &Value::from("under_way")), "{answer}");
    let message = answer["error"]["message"].as_str().expect("a message");
    assert!(message.starts_with("DELETE /v1/volumes/web-01 is still under way after"), "{message}");
    assert!(answer["error"]["next"].as_str().is_some_and(|next| next.contains("`blockferry status`")), "{answer}");
    assert!(site.volumes.lock().contains_key(&name("web-01")));
    open.send(()).expect("the removal still waits");
    until(|| !site.volumes.lock().contains_key(&name("web-01"))).await;
}

#[tokio::test]
async fn a_request_that_never_arrives_in_full_changes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.sock");
    let (listener, _file) = ControlSocket::bind(&path).expect("bound").into_parts();
    let site = FakeSite::with_volumes();
    let app = router(site.clone(), Bounds::new(Duration::from_millis(20)));
    tokio::spawn(async move { axum::serve(listener, app).await });
    let mut client = UnixStream::connect(&path).await.expect("connects");
    let head = b"POST /v1/volumes/db-01/cancel HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{";
    client.write_all(head).await.expect("sent");
    let mut answer = vec![0u8; 4096];
    let read = client.read(&mut answer).await.expect("answered");
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("\"unavailable\""), "{answer}");
    assert!(site.calls.lock().is_empty(), "{:?}", site.calls.lock());
}

#[tokio::test]
async fn a_change_that_panics_is_answered() {
    let daemon = FakeDaemon::start();
    let (status, answer) = raw(&daemon.socket(), "DELETE", "/v1/volumes/panics", "").await;
    assert_eq!((status, &answer["error"]["kind"]), (500, &Value::from("internal")), "{answer}");
}

#[tokio::test]
async fn shutting_down_lets_changes_end_whose_clients_left() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.sock");
    let (site, open) = gated();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = ControlServer::bind(&path).expect("bound");
    let shutdown = async move {
        let _ = stopped.await;
    };
    let serving = tokio::spawn(server.serve(site.clone(), shutdown));
    let mut client = UnixStream::connect(&path).await.expect("connects");
    client.write_all(b"DELETE /v1/volumes/web-01 HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    until(|| site.change_gate.lock().is_none()).await;
    drop(client);
    stop.send(()).expect("still serving");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!serving.is_finished(), "the removal has not ended");
    open.send(()).expect("the removal still waits");
    serving.await.expect("no panic").expect("ended well");
    assert!(!site.volumes.lock().contains_key(&name("web-01")));
}

#[tokio::test]
async fn shutting_down_answers_what_was_asked() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.sock");
    let site = FakeSite::with_volumes();
    let (open, gate) = oneshot::channel();
    *site.gate.lock() = Some(gate);
    let (stop, stopped) = oneshot::channel::<()>();
    let server = ControlServer::bind(&path).expect("bound");
    assert_eq!(server.socket_path(), path);
    let shutdown = async move {
        let _ = stopped.await;
    };
    let serving = tokio::spawn(server.serve(site.clone(), shutdown));
    let asking = tokio::spawn({
        let client = ControlClient::new(&path);
        async move { client.status().await }
    });
    // The request has arrived once the site has taken the gate.
    while site.gate.lock().is_some() {
        tokio::task::yield_now().await;
    }
    stop.send(()).expect("still serving");
    open.send(()).expect("still asking");
    assert_eq!(asking.await.expect("no panic").expect("answered").site.as_str(), "site-a");
    serving.await.expect("no panic").expect("ended well");
    assert!(!path.exists());
    let error = ControlClient::new(&path).status().await.expect_err("nobody there").to_string();
    assert!(error.contains(&path.display().to_string()) && error.contains("`blockferry serve`"), "{error}");
    assert_eq!(error.lines().count(), 1);
}

#[tokio::test]
async fn connections_are_bounded() {
    let daemon = FakeDaemon::start();
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let mut stream = UnixStream::connect(daemon.socket()).await.expect("connects");
        // A keep-alive request proves that the connection was admitted.
        stream.write_all(b"GET /v1/store HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
        let mut first = [0u8; 12];
        stream.read_exact(&mut first).await.expect("answered");
        assert_eq!(&first, b"HTTP/1.1 200");
        idle.push(stream);
    }
    let client = daemon.client();
    let mut waiting = Box::pin(client.store_stats());
    let answered_while_full = tokio::time::timeout(Duration::from_millis(50), &mut waiting).await;
    assert!(answered_while_full.is_err());
    idle.pop();
    waiting.await.expect("admitted once there is room");
}

#[tokio::test]
async fn other_programs_are_not_mistaken_for_a_daemon() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    tokio::spawn(async move {
        for answer in ["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "SSH-2.0-x\r\n"] {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let mut head = [0u8; 1024];
            let _ = stream.read(&mut head).await;
            stream.write_all(answer.as_bytes()).await.expect("answered");
        }
    });
    for words in ["answered something else", "ended the conversation"] {
        let error = ControlClient::new(&path).status().await.expect_err("no status").to_string();
        assert!(error.contains(words) && error.contains("another version"), "{error}");
    }
}

#[tokio::test]
async fn a_daemon_that_ends_before_its_answer_is_told_apart() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    let answers = ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{"];
    tokio::spawn(async move {
        for answer in answers {
            // Closed with the request read, as a daemon does that is stopped, and with it unread, as one that is killed.
            for is_read in [true, false] {
                let (mut stream, _) = listener.accept().await.expect("accepted");
                if is_read {
                    let mut head = [0u8; 1024];
                    let _ = stream.read(&mut head).await;
                }
                stream.write_all(answer.as_bytes()).await.expect("answered");
            }
        }
    });
    for answer in answers {
        for _ in 0..2 {
            let error = ControlClient::new(&path).status().await.expect_err("no status");
            assert!(matches!(error, ClientError::Ended { .. }), "{answer:?}: {error}");
            assert!(error.to_string().contains("ended before it answered"), "{error}");
        }
    }
}
