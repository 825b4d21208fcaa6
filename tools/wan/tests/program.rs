//! The program: its ready line, its control socket, its end.

use std::io::{BufRead, BufReader, Read};
use std::net::UdpSocket;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

struct Running {
    child: Child,
    out: BufReader<ChildStdout>,
    listen: String,
    control: String,
}

impl Running {
    fn start(options: &[&str]) -> Running {
        let mut child = Command::new(env!("CARGO_BIN_EXE_wan")).args(options).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["ready", listen, control] = words[..] else { panic!("{line}") };
        let listen = listen.strip_prefix("listen=").unwrap().to_owned();
        let control = control.strip_prefix("control=").unwrap().to_owned();
        Running { child, out, listen, control }
    }

    fn ctl(&self, command: &str) -> Output {
        wan(&["ctl", &self.control, command])
    }

    /// Its last line, once it has ended well.
    fn end(mut self) -> serde_json::Value {
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        serde_json::from_str(rest.lines().last().unwrap()).unwrap()
    }
}

fn wan(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wan")).args(args).output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn relays_obeys_and_quits() {
    let dir = tempfile::tempdir().unwrap();
    let control = format!("unix:{}", dir.path().join("wan.sock").display());
    let target = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = target.local_addr().unwrap().to_string();
    let options = ["--to", &to, "--rate", "100Mbit/s", "--rtt", "2ms", "--queue", "64KiB", "--control", &control];
    let running = Running::start(&options);
    assert_eq!(running.control, control);

    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"hello", &running.listen).unwrap();
    let mut buffer = [0; 10];
    assert_eq!(target.recv(&mut buffer).unwrap(), 5);
    assert_eq!(json(&running.ctl("stats"))["up"]["wire_bytes"], 33);
    assert_eq!(json(&running.ctl("cut up"))["up"]["cut"], true);
    assert_eq!(json(&running.ctl("mend"))["up"]["cut"], false);
    assert_eq!(json(&running.ctl("set rate=10Mbit/s loss=1%"))["ok"], true);
    assert_eq!(json(&running.ctl("reset"))["up"]["wire_bytes"], 0);

    let refused = running.ctl("set rate=fast");
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("fast"));

    let second = wan(&options);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use"), "{second:?}");

    json(&running.ctl("quit"));
    assert_eq!(running.end()["clients"], 1);
    assert!(!dir.path().join("wan.sock").exists());
}

#[test]
fn a_signal_prints_the_counters_and_a_stale_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wan.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let control = format!("unix:{}", path.display());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let running = Running::start(&["--to", "127.0.0.1:9", "--control", &control]);
        kill(Pid::from_raw(running.child.id() as i32), signal).unwrap();
        assert_eq!(running.end()["up"]["offered_packets"], 0);
    }
}

#[test]
fn a_tcp_control_socket_says_its_port() {
    let running = Running::start(&["--to", "127.0.0.1:9", "--control", "127.0.0.1:0"]);
    assert!(!running.control.ends_with(":0"));
    json(&running.ctl("stats"));
    json(&running.ctl("quit"));
    running.end();
}

#[test]
fn wrong_usage_is_status_2() {
    for args in [&["--to", "nowhere"][..], &[], &["--to", "127.0.0.1:0"], &["--to", "127.0.0.1:9", "--loss", "200%"]] {
        let output = wan(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty());
    }
    assert_eq!(wan(&["ctl", "unix:/nonexistent/wan.sock", "stats"]).status.code(), Some(1));
}
