//! Follows what goes on in the daemon: relocations until they have arrived, a prewarm until it has ended, a status
//! until somebody interrupts. With somebody watching, bars; else a line every few seconds.
//! Must not know how any of it was begun.

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::control::{ApiError, ClientError, ControlClient, JobId, Phase, PrewarmStatus, VolumeStatus};
use crate::core::ids::Name;

use super::console::{CliError, Console, Pace};
use super::show;
use super::verdict::{Until, Verdict, Wait, verdict};

/// What came of a relocation, and the last that was seen of its volume.
pub(super) struct Outcome {
    pub status: Option<Box<VolumeStatus>>,
    /// Why it did not come about.
    pub error: Option<ApiError>,
}

/// Follows `volumes` until it is settled for each whether what is waited for has come about. The outcomes, in their
/// order.
pub(super) async fn relocations(
    client: &ControlClient,
    volumes: &[Name],
    wait: Wait,
    console: &mut Console<'_>,
) -> Result<Vec<Outcome>, CliError> {
    let began = Instant::now();
    let mut tell = Teller::new(console.watched);
    let mut absence = Absence::default();
    let mut outcomes: HashMap<&Name, Outcome> = HashMap::new();
    loop {
        for name in volumes {
            if outcomes.contains_key(name) {
                continue;
            }
            let answer = match client.volume(name).await {
                Ok(status) => Ok(Box::new(status)),
                Err(ClientError::Refused(error)) if !error.kind.is_passing() => Err(error),
                // Relocations survive a restart of the daemon, so waiting for them should, too.
                Err(error) => {
                    absence.lasts(error, console)?;
                    break;
                }
            };
            absence.ended();
            let verdict = verdict(answer.as_deref(), began.elapsed(), wait);
            if let Ok(status) = &answer
                && (wait.until == Until::Arrived || verdict == Verdict::GoesOn)
            {
                tell.relocation(status, console);
            }
            let error = match verdict {
                Verdict::GoesOn => continue,
                Verdict::Reached => None,
                Verdict::Ended(error) => Some(error),
            };
            outcomes.insert(name, Outcome { status: answer.ok(), error });
        }
        if outcomes.len() == volumes.len() {
            return Ok(volumes.iter().filter_map(|name| outcomes.remove(name)).collect());
        }
        tokio::time::sleep(console.pace.poll).await;
    }
}

/// Tells how the hand-overs of `volumes` go, for as long as the request that began them takes; does not end by itself.
pub(super) async fn handovers(client: &ControlClient, volumes: &[Name], console: &mut Console<'_>) -> Infallible {
    tokio::time::sleep(console.pace.quiet).await;
    let mut tell = Teller::new(console.watched);
    loop {
        for name in volumes {
            // That a volume is not known yet, or that it cannot be told, is settled when the request is answered.
            if let Ok(status) = client.volume(name).await
                && status.phase == Phase::Connecting
            {
                tell.relocation(&status, console);
            }
        }
        tokio::time::sleep(console.pace.poll).await;
    }
}

/// Follows a prewarm until it has ended, well or not.
pub(super) async fn prewarm(
    client: &ControlClient,
    job: JobId,
    console: &mut Console<'_>,
) -> Result<PrewarmStatus, CliError> {
    let mut tell = Teller::new(console.watched);
    loop {
        // A restarted daemon does not know the job any more: no use waiting for it.
        let status = client.prewarm_status(job).await?;
        tell.prewarm(&status, console);
        if status.done {
            return Ok(status);
        }
        tokio::time::sleep(console.pace.poll).await;
    }
}

/// Shows what `look` returns again and again. Ends only with an error (nobody takes the output, no such volume).
pub(super) async fn watch(
    mut look: impl AsyncFnMut() -> Result<String, ClientError>,
    pace: Pace,
    console: &mut Console<'_>,
) -> Result<(), CliError> {
    let mut absence = Absence::default();
    loop {
        match look().await {
            Ok(text) => {
                absence.ended();
                // Home, then clear what lies below: less flicker than clearing first.
                let (before, after) = if console.redraws { ("\x1b[H\x1b[J", "") } else { ("", "\n") };
                write!(console.out, "{before}{text}{after}")?;
                console.out.flush()?;
            }
            Err(error @ ClientError::Refused(_)) => return Err(error.into()),
            Err(error) => absence.lasts(error, console)?,
        }
        tokio::time::sleep(pace.poll).await;
    }
}

/// A bar that counts bytes.
pub(super) fn bar_of_bytes(label: &str) -> ProgressBar {
    ProgressBar::new(0)
        .with_style(style("{prefix} {wide_bar} {percent:>3}%  {binary_bytes_per_sec}  {eta} left"))
        .with_prefix(label.to_owned())
}

fn style(template: &str) -> ProgressStyle {
    // A test looks at the templates; should one be wrong after all, the default bar serves.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Tells progress: bars, or lines at a bounded pace.
struct Teller {
    bars: Option<MultiProgress>,
    bar_by_name: HashMap<Name, ProgressBar>,
    prewarm_bar: Option<ProgressBar>,
    last_by_name: HashMap<Name, (Phase, Instant)>,
    last_prewarm: Option<Instant>,
}

impl Teller {
    fn new(watched: bool) -> Teller {
        Teller {
            bars: watched.then(MultiProgress::new),
            bar_by_name: HashMap::new(),
            prewarm_bar: None,
            last_by_name: HashMap::new(),
            last_prewarm: None,
        }
    }

    fn relocation(&mut self, status: &VolumeStatus, console: &mut Console<'_>) {
        let text = show::progress(status);
        let Some(bars) = &self.bars else {
            let last = self.last_by_name.get(&status.name);
            // A new phase is always worth a line.
            if last.is_none_or(|(phase, at)| *phase != status.phase || at.elapsed() >= console.pace.line) {
                self.last_by_name.insert(status.name.clone(), (status.phase, Instant::now()));
                console.note(format!("{}  {}%  {text}", status.name, show::percent_done(status)));
            }
            return;
        };
        let bar = self.bar_by_name.entry(status.name.clone()).or_insert_with(|| {
            let prefix = show::shortened(status.name.as_str(), 16);
            bars.add(
                ProgressBar::new(0).with_style(style("{prefix} {wide_bar} {percent:>3}%  {msg}")).with_prefix(prefix),
            )
        });
        bar.set_length(status.blocks.total);
        bar.set_position(status.blocks.total.saturating_sub(status.blocks.absent));
        bar.set_message(text);
    }

    fn prewarm(&mut self, status: &PrewarmStatus, console: &mut Console<'_>) {
        if let Some(bars) = &self.bars {
            let bar = self.prewarm_bar.get_or_insert_with(|| bars.add(bar_of_bytes("prewarm")));
            bar.set_length(status.bytes_total);
            bar.set_position(status.bytes_done);
        } else if self.last_prewarm.is_none_or(|at| at.elapsed() >= console.pace.line) {
            self.last_prewarm = Some(Instant::now());
            let percent = status.bytes_done.saturating_mul(100).checked_div(status.bytes_total).unwrap_or(100);
            console.note(format!("prewarm  {percent}%  {}", show::prewarmed(status)));
        }
    }
}

/// Takes the bars away: the outcome is told as text.
impl Drop for Teller {
    fn drop(&mut self) {
        for bar in self.bar_by_name.values().chain(&self.prewarm_bar) {
            bar.finish_and_clear();
        }
    }
}

/// A daemon that does not answer, and since when.
#[derive(Default)]
struct Absence {
    since: Option<Instant>,
}

impl Absence {
    fn ended(&mut self) {
        self.since = None;
    }

    /// The error itself, once the daemon has been away for too long.
    fn lasts(&mut self, error: ClientError, console: &mut Console<'_>) -> Result<(), CliError> {
        let since = *self.since.get_or_insert_with(|| {
            console.note(format!("{error}; waiting for {} s", console.pace.absence.as_secs()));
            Instant::now()
        });
        if since.elapsed() >= console.pace.absence { Err(error.into()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_valid() {
        for template in [
            "{prefix} {wide_bar} {percent:>3}%  {msg}",
            "{prefix} {wide_bar} {percent:>3}%  {binary_bytes_per_sec}  {eta} left",
        ] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
