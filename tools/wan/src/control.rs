//! The control protocol: one command a line, one JSON object a line in answer.
//! Must not know: sockets, threads.
//!
//! | command | does |
//! |---|---|
//! | `stats` | nothing but answer |
//! | `reset` | sets the counters to zero |
//! | `cut [up\|down]` | what is offered or due is lost until `mend` |
//! | `mend [up\|down]` | ends the cut |
//! | `set [up\|down] rate=.. delay=.. rtt=.. jitter=.. loss=.. queue=..` | changes what is named |
//! | `quit` | answers, then ends the relay |
//!
//! Every answer is `{"ok":true, ...}` with the fields of [`WanStats`] as they are after the command, or
//! `{"ok":false,"error":"..."}`.

use serde::Serialize;

use crate::link::{LinkChange, Queue};
use crate::relay::Request;
use crate::stats::WanStats;
use crate::units::{Span, parse_rate_limit, parse_size};
use crate::wan::Direction;

/// A parsed command.
#[derive(Clone, Copy, Debug)]
pub enum Command {
    /// For the relay.
    Ask(Request),
    /// For the program.
    Quit,
}

/// Parses one line.
///
/// # Errors
/// A sentence that names the word that is wrong and what would be right.
pub fn parse(line: &str) -> Result<Command, String> {
    let mut words = line.split_ascii_whitespace().peekable();
    let verb = words.next().unwrap_or("");
    let direction = match words.peek() {
        Some(&"up") => Direction::Up,
        Some(&"down") => Direction::Down,
        _ => Direction::Both,
    };
    let takes_direction = matches!(verb, "cut" | "mend" | "set");
    if takes_direction && direction != Direction::Both {
        words.next();
    }
    let command = match verb {
        "stats" => Command::Ask(Request::Stats),
        "reset" => Command::Ask(Request::Reset),
        "cut" => Command::Ask(Request::Cut(direction)),
        "mend" => Command::Ask(Request::Mend(direction)),
        "set" => Command::Ask(Request::Change(direction, parse_change(&mut words)?)),
        "quit" => Command::Quit,
        _ => return Err(format!("`{verb}` is not a command: stats, reset, cut, mend, set KEY=VALUE.., quit")),
    };
    match words.next() {
        None => Ok(command),
        Some(word) => Err(format!("`{word}` does not belong to `{verb}`")),
    }
}

fn parse_change<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<LinkChange, String> {
    let mut change = LinkChange::default();
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!("`{word}`: set takes KEY=VALUE, such as rate=100Mbit/s"));
        };
        match key {
            "rate" => change.rate = Some(parse_rate_limit(value)?),
            "delay" => change.delay = Some(value.parse::<Span>()?.0),
            "rtt" => change.delay = Some(value.parse::<Span>()?.0 / 2),
            "jitter" => change.jitter = Some(value.parse::<Span>()?.0),
            "loss" => change.loss = Some(value.parse()?),
            "queue" => change.queue = Some(parse_queue(value)?),
            _ => return Err(format!("`{key}` cannot be set: rate, delay, rtt, jitter, loss, queue")),
        }
    }
    if change == LinkChange::default() {
        return Err("set takes at least one KEY=VALUE, such as rate=100Mbit/s".into());
    }
    Ok(change)
}

/// A queue limit by time (`100ms`) or by wire bytes (`64KiB`).
///
/// # Errors
/// A sentence that says what would be right.
pub fn parse_queue(text: &str) -> Result<Queue, String> {
    if let Ok(Span(time)) = text.parse() {
        return Ok(Queue::Time(time));
    }
    parse_size(text)
        .map(Queue::Bytes)
        .map_err(|_| format!("`{text}` is not a queue: write a time (100ms) or a size (64KiB)"))
}

/// The line that answers a command, without the newline.
pub fn answer(result: Result<WanStats, String>) -> String {
    #[derive(Serialize)]
    struct Done {
        ok: bool,
        #[serde(flatten)]
        stats: WanStats,
    }
    #[derive(Serialize)]
    struct Refused {
        ok: bool,
        error: String,
    }
    let json = match result {
        Ok(stats) => serde_json::to_string(&Done { ok: true, stats }),
        Err(error) => serde_json::to_string(&Refused { ok: false, error }),
    };
    // Neither structure holds anything that JSON cannot.
    json.unwrap_or_else(|error| format!(r#"{{"ok":false,"error":"{error}"}}"#))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn request(line: &str) -> Request {
        match parse(line) {
            Ok(Command::Ask(request)) => request,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn commands() {
        assert!(matches!(request(" stats "), Request::Stats));
        assert!(matches!(request("reset"), Request::Reset));
        assert!(matches!(request("cut"), Request::Cut(Direction::Both)));
        assert!(matches!(request("cut up"), Request::Cut(Direction::Up)));
        assert!(matches!(request("mend down"), Request::Mend(Direction::Down)));
        assert!(matches!(parse("quit"), Ok(Command::Quit)));
    }

    #[test]
    fn changes() {
        let Request::Change(Direction::Up, change) = request("set up rate=10Mbit/s rtt=80ms queue=64KiB loss=1%")
        else {
            panic!("change");
        };
        assert_eq!(change.rate, Some("10Mbit/s".parse().ok()));
        assert_eq!(change.delay, Some(Duration::from_millis(40)));
        assert_eq!(change.queue, Some(Queue::Bytes(65536)));
        assert_eq!(change.loss.unwrap().get(), 0.01);
        assert_eq!(change.jitter, None);
        let Request::Change(_, change) = request("set rate=unlimited queue=5ms") else { panic!("change") };
        assert_eq!(change.rate, Some(None));
        assert_eq!(change.queue, Some(Queue::Time(Duration::from_millis(5))));
    }

    #[test]
    fn wrong_lines_say_what_is_wrong() {
        for (line, word) in [
            ("", "stats"),
            ("stop", "stop"),
            ("stats up", "up"),
            ("cut sideways", "sideways"),
            ("set", "KEY=VALUE"),
            ("set rate", "rate"),
            ("set rate=fast", "fast"),
            ("set mtu=9", "mtu"),
            ("set queue=-1", "-1"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn answers_are_one_json_line() {
        let stats = WanStats {
            elapsed_s: 1.0,
            clients: 2,
            refused_packets: 0,
            cpu_s: 0.5,
            max_late_ms: 0.1,
            up: Default::default(),
            down: Default::default(),
        };
        let good: serde_json::Value = serde_json::from_str(&answer(Ok(stats))).unwrap();
        assert_eq!((&good["ok"], &good["clients"], &good["up"]["wire_bytes"]), (&true.into(), &2.into(), &0.into()));
        let bad: serde_json::Value = serde_json::from_str(&answer(Err("no \"such\"\n".into()))).unwrap();
        assert_eq!((&bad["ok"], &bad["error"]), (&false.into(), &"no \"such\"\n".into()));
    }
}
