//! What an answer about a volume means for somebody who waits for its relocation. Pure: answers and times go in.
//! Must not know how the answers come here, nor how they are shown.

use std::time::Duration;

use crate::control::{ApiError, ErrorKind, Phase, VolumeStatus};
use crate::units::approx_seconds;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// The volume is owned and served here.
    Owned,
    /// All of it is here.
    Arrived,
}

/// What is waited for, and how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub until: Until,
    /// A hand-over that is not settled by then is not waited for any longer. More than the time after which the site
    /// itself withdraws it.
    pub handover: Duration,
    /// As long as this the site may not know the name yet.
    pub unknown: Duration,
}

/// What an answer means.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// Ask again.
    GoesOn,
    /// What was waited for has come about.
    Reached,
    /// It has not, and is not waited for any longer.
    Ended(ApiError),
}

/// What `answer` means after `waited`.
pub(super) fn verdict(answer: Result<&VolumeStatus, &ApiError>, waited: Duration, wait: Wait) -> Verdict {
    let status = match answer {
        Ok(status) => status,
        Err(error) if error.kind.is_passing() => return Verdict::GoesOn,
        Err(error) if error.kind == ErrorKind::NotFound && waited < wait.unknown => return Verdict::GoesOn,
        // The name is gone: withdrawn, refused or given up. The site says which, as long as it knows.
        Err(error) => return Verdict::Ended(error.clone()),
    };
    let name = &status.name;
    let ended = |kind, message: String| {
        let reason = status.phase_reason.as_str();
        let message = if reason.is_empty() { message } else { format!("{message}: {reason}") };
        let next = format!("`blockferry status {name}` and the daemon's log say more");
        Verdict::Ended(ApiError::new(kind, message, next))
    };
    match status.phase {
        Phase::Failed => ended(ErrorKind::Unavailable, format!("{name} failed")),
        Phase::Fenced => ended(ErrorKind::Refused, format!("{name} is fenced here")),
        Phase::GivingBack => ended(ErrorKind::Conflict, format!("{name} is being given back")),
        Phase::Released => ended(ErrorKind::Conflict, format!("{name} has left again; {} owns it", status.owner)),
        Phase::Connecting if waited >= wait.handover => {
            let waited = approx_seconds(waited.as_secs_f64());
            let message = format!("the hand-over of {name} is not settled after {waited}, and may still come about");
            ended(ErrorKind::UnderWay, message)
        }
        Phase::Connecting => Verdict::GoesOn,
        Phase::Copying | Phase::Paused | Phase::Stalled if wait.until == Until::Arrived => Verdict::GoesOn,
        Phase::Copying | Phase::Paused | Phase::Stalled => Verdict::Reached,
        Phase::Complete | Phase::ReleasedFromSource | Phase::Owned => Verdict::Reached,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Role;
    use crate::control::fake::volume;

    const ALL: [Phase; 11] = [
        Phase::Owned,
        Phase::Released,
        Phase::Connecting,
        Phase::Copying,
        Phase::Paused,
        Phase::Stalled,
        Phase::Complete,
        Phase::ReleasedFromSource,
        Phase::GivingBack,
        Phase::Fenced,
        Phase::Failed,
    ];
    const EARLY: Duration = Duration::from_secs(1);
    const LATE: Duration = Duration::from_secs(330);

    fn wait(until: Until) -> Wait {
        Wait { until, handover: LATE, unknown: Duration::from_secs(60) }
    }

    fn of_phase(phase: Phase, reason: &str, waited: Duration, until: Until) -> Verdict {
        let mut status = volume("web-01", Role::Destination, phase);
        status.phase_reason = reason.to_owned();
        verdict(Ok(&status), waited, wait(until))
    }

    /// The kind and the text of an end.
    fn end(verdict: Verdict) -> (ErrorKind, String) {
        match verdict {
            Verdict::Ended(error) => (error.kind, error.to_string()),
            other => panic!("not an end: {other:?}"),
        }
    }

    #[test]
    fn only_an_owned_volume_is_reached() {
        let reached = |until, waited| -> Vec<Phase> {
            ALL.into_iter().filter(|phase| of_phase(*phase, "", waited, until) == Verdict::Reached).collect()
        };
        let arrived = [Phase::Owned, Phase::Complete, Phase::ReleasedFromSource];
        let coming = [Phase::Copying, Phase::Paused, Phase::Stalled];
        for waited in [Duration::ZERO, EARLY, LATE] {
            assert_eq!(reached(Until::Arrived, waited), arrived);
            let mut owned = [&arrived[..], &coming].concat();
            owned.sort_by_key(|phase| ALL.iter().position(|other| other == phase));
            assert_eq!(reached(Until::Owned, waited), owned);
        }
        for phase in ALL {
            assert_eq!(phase.has_arrived(), arrived.contains(&phase), "{phase:?}");
        }
    }

    #[test]
    fn a_copy_goes_on_however_long_it_takes() {
        for phase in [Phase::Copying, Phase::Paused, Phase::Stalled] {
            assert_eq!(of_phase(phase, "the link is down", LATE * 1000, Until::Arrived), Verdict::GoesOn);
        }
    }

    #[test]
    fn a_hand_over_is_waited_for_within_its_time_and_never_said_to_have_failed() {
        for until in [Until::Owned, Until::Arrived] {
            let early = of_phase(Phase::Connecting, "a is writing back its cache", EARLY, until);
            assert_eq!(early, Verdict::GoesOn);
            let (kind, text) = end(of_phase(Phase::Connecting, "a is writing back its cache", LATE, until));
            assert_eq!(kind, ErrorKind::UnderWay);
            assert!(text.contains("is not settled after 5m 30s, and may still come about"), "{text}");
            assert!(text.contains("a is writing back its cache") && !text.contains("failed"), "{text}");
        }
    }

    #[test]
    fn what_cannot_come_about_any_more_ends_at_once() {
        for (phase, words) in [
            (Phase::Failed, "web-01 failed: why; `blockferry status web-01`"),
            (Phase::Fenced, "web-01 is fenced here: why"),
            (Phase::GivingBack, "web-01 is being given back: why"),
            (Phase::Released, "web-01 has left again; site-a owns it: why"),
        ] {
            for until in [Until::Owned, Until::Arrived] {
                let (_, text) = end(of_phase(phase, "why", EARLY, until));
                assert!(text.starts_with(words), "{text}");
            }
        }
        let (_, text) = end(of_phase(Phase::Failed, "", EARLY, Until::Owned));
        assert!(text.starts_with("web-01 failed; "), "{text}");
    }

    #[test]
    fn a_refusal_ends_with_its_reason_and_a_daemon_in_trouble_is_no_refusal() {
        let of_kind = |kind, waited| {
            let error = ApiError::new(kind, "site-b withdrew the hand-over of web-01", "relocate it again");
            verdict(Err(&error), waited, wait(Until::Owned))
        };
        for kind in [ErrorKind::Conflict, ErrorKind::Refused, ErrorKind::Invalid] {
            let text = "site-b withdrew the hand-over of web-01; relocate it again".to_owned();
            assert_eq!(end(of_kind(kind, EARLY)), (kind, text));
        }
        for kind in [ErrorKind::Unavailable, ErrorKind::UnderWay, ErrorKind::Internal] {
            assert_eq!(of_kind(kind, LATE * 2), Verdict::GoesOn);
        }
        assert_eq!(of_kind(ErrorKind::NotFound, Duration::from_secs(59)), Verdict::GoesOn);
        assert_eq!(end(of_kind(ErrorKind::NotFound, Duration::from_secs(60))).0, ErrorKind::NotFound);
    }
}
