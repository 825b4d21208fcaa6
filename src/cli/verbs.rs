//! The verbs that ask a daemon.
//! Must not know how the daemon does it, nor what a report looks like.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::control::{
    AddVolume, ApiError, Cancel, ClientError, ControlClient, DEFAULT_HANDOVER_TIMEOUT, ErrorKind, JobId, PrewarmStatus,
    Reclaim, RelocateRequest, RelocationAnswer, VolumeStatus,
};
use crate::core::ids::Name;

use super::args::{PeerVerb, PrewarmArgs, RelocateArgs, StatusArgs, StoreVerb, Verb, VolumeVerb};
use super::console::{CliError, Console, Pace};
use super::fleet::{FleetItem, read_fleet};
use super::follow::{self, Outcome};
use super::verdict::{Until, Wait};
use super::{daemon, show};

/// What `relocate --json` reports.
#[derive(Serialize)]
struct RelocateReport {
    relocations: Vec<RelocationReport>,
}

#[derive(Serialize)]
struct RelocationReport {
    peer: Name,
    volume: Name,
    /// Why it was not begun, or how it failed.
    error: Option<ApiError>,
    /// How it ended; only with `--wait`.
    status: Option<Box<VolumeStatus>>,
}

/// What `prewarm --json` reports.
#[derive(Serialize)]
struct PrewarmReport {
    job: JobId,
    #[serde(flatten)]
    status: PrewarmStatus,
}

/// Asks the daemon what `verb` says.
pub(super) async fn ask(verb: Verb, console: &mut Console<'_>) -> Result<(), CliError> {
    match verb {
        Verb::Volume(VolumeVerb::Add(args)) => {
            let client = daemon::find(&args.daemon, console)?;
            let add = AddVolume { name: args.name, image: absolute(&args.image)?, again: args.again };
            let status = client.add_volume(&add).await?;
            if args.json {
                return console.say_json(&status);
            }
            console.say(format!("{}: {} is served by NBD", status.name, status.image.display()))
        }
        Verb::Volume(VolumeVerb::List(args)) => {
            let all = daemon::find(&args.daemon, console)?.volumes().await?;
            if args.json { console.say_json(&all) } else { console.say(show::volumes(&all).trim_end()) }
        }
        Verb::Volume(VolumeVerb::Show(args)) => {
            let status = daemon::find(&args.daemon, console)?.volume(&args.name).await?;
            if args.json { console.say_json(&status) } else { console.say(show::volume(&status).trim_end()) }
        }
        Verb::Volume(VolumeVerb::Remove(args)) => {
            daemon::find(&args.daemon, console)?.remove_volume(&args.name).await?;
            console.say(format!("{}: no longer served; its image stays", args.name))
        }
        Verb::Relocate(args) => relocate(args, console).await,
        Verb::Status(args) => status(args, console).await,
        Verb::Pause(args) => {
            daemon::find(&args.daemon, console)?.pause(&args.name).await?;
            console.say(format!("{}: bulk copy paused", args.name))
        }
        Verb::Resume(args) => {
            daemon::find(&args.daemon, console)?.resume(&args.name).await?;
            console.say(format!("{}: bulk copy goes on", args.name))
        }
        Verb::Limit(args) => {
            daemon::find(&args.daemon, console)?.limit(&args.name, args.rate.as_bytes_per_s()).await?;
            console.say(format!("{}: bulk limit is {}", args.name, args.rate))
        }
        Verb::Cancel(args) => {
            let cancel = Cancel { discard_writes: args.discard_writes };
            let answer = daemon::find(&args.daemon, console)?.cancel(&args.name, cancel).await?;
            if args.json {
                return console.say_json(&answer);
            }
            console.say(show::cancelled(&args.name, answer.as_ref()).trim_end())
        }
        Verb::Reclaim(args) => {
            let reclaim = Reclaim { epoch: args.epoch };
            let answer = daemon::find(&args.daemon, console)?.reclaim(&args.name, reclaim).await?;
            if args.json {
                console.say_json(&answer)
            } else {
                console.say(show::reclaimed(&args.name, &answer).trim_end())
            }
        }
        Verb::Prewarm(args) => prewarm(args, console).await,
        Verb::Peer(PeerVerb::Accept(args)) => {
            daemon::find(&args.daemon, console)?.accept_peer(&args.name).await?;
            console.say(format!("{}: whichever instance comes next is the one", args.name))
        }
        Verb::Store(StoreVerb::Stats(args)) => {
            let stats = daemon::find(&args.daemon, console)?.store_stats().await?;
            if args.json { console.say_json(&stats) } else { console.say(show::store(&stats).trim_end()) }
        }
        Verb::Init(_) | Verb::Serve(_) | Verb::Analyze(_) => {
            Err(CliError::Failed("this verb asks no daemon: report it as a bug".to_owned()))
        }
    }
}

async fn relocate(args: RelocateArgs, console: &mut Console<'_>) -> Result<(), CliError> {
    let client = daemon::find(&args.daemon, console)?;
    let (answers, unknown) = begin_relocations(&client, relocate_requests(&args)?, console).await?;
    let all = answers.len();
    let mut failures = Failures { of: all, count: 0, only: None };
    let mut relocations: Vec<RelocationReport> = Vec::with_capacity(all);
    for RelocationAnswer { peer, volume, error } in answers {
        if let Some(error) = &error {
            failures.add(format!("{peer}/{volume}: {error}"), console);
        }
        relocations.push(RelocationReport { peer, volume, error, status: None });
    }
    let timeout = args.timeout.map_or(DEFAULT_HANDOVER_TIMEOUT, |timeout| timeout.0);
    let until = if args.wait { Until::Arrived } else { Until::Owned };
    let wait = Wait { until, handover: timeout.saturating_add(console.pace.slack), unknown };
    let begun: Vec<_> = relocations.iter_mut().filter(|report| report.error.is_none()).collect();
    let names: Vec<Name> = begun.iter().map(|report| report.volume.clone()).collect();
    let outcomes = follow::relocations(&client, &names, wait, console).await?;
    for (report, Outcome { status, error }) in begun.into_iter().zip(outcomes) {
        match (&error, &status) {
            (Some(error), _) => failures.add(format!("{}/{}: {error}", report.peer, report.volume), console),
            _ if args.json => {}
            (None, Some(status)) if args.wait => console.say(show::arrived(status))?,
            (None, _) => console.say(format!("{}: served here, and on its way from {}", report.volume, report.peer))?,
        }
        report.error = error;
        report.status = status.filter(|_| args.wait);
    }
    if args.json {
        console.say_json(&RelocateReport { relocations })?;
    }
    failures.result()
}

/// Asks for the relocations. Their answers, and how long a name may be unknown to the site although it was asked for.
async fn begin_relocations(
    client: &ControlClient,
    requests: Vec<RelocateRequest>,
    console: &mut Console<'_>,
) -> Result<(Vec<RelocationAnswer>, Duration), CliError> {
    let names: Vec<Name> = requests.iter().map(|request| request.volume.clone()).collect();
    let asked = requests.clone();
    let answer = tokio::select! {
        answer = client.relocate(requests) => answer,
        never = follow::handovers(client, &names, console) => match never {},
    };
    match answer {
        Ok(answers) => Ok((answers, Duration::ZERO)),
        // They go on, and the site says of each what became of it.
        Err(ClientError::Refused(error)) if error.kind == ErrorKind::UnderWay => {
            console.note(error.to_string());
            let begun =
                |request: RelocateRequest| RelocationAnswer { peer: request.peer, volume: request.volume, error: None };
            Ok((asked.into_iter().map(begun).collect(), console.pace.absence))
        }
        Err(error) => Err(error.into()),
    }
}

/// What failed of several relocations. A single one is the verb's own failure, in one line; of several, each has its
/// line as soon as it is known.
struct Failures {
    of: usize,
    count: usize,
    only: Option<String>,
}

impl Failures {
    fn add(&mut self, failure: String, console: &mut Console<'_>) {
        self.count += 1;
        if self.of == 1 {
            self.only = Some(failure);
        } else {
            console.note(format!("blockferry: {failure}"));
        }
    }

    fn result(self) -> Result<(), CliError> {
        match (self.only, self.count) {
            (Some(failure), _) => Err(CliError::Failed(failure)),
            (None, 0) => Ok(()),
            (None, count) => Err(CliError::Failed(format!("{count} of {} relocations failed: see above", self.of))),
        }
    }
}

fn relocate_requests(args: &RelocateArgs) -> Result<Vec<RelocateRequest>, CliError> {
    let items = match &args.fleet {
        Some(fleet) => read_fleet(fleet).map_err(|error| CliError::Usage(error.to_string()))?,
        None => {
            if args.image.is_some() && args.remotes.len() > 1 {
                let usage = "--image names one file, and several volumes are relocated: list them in a --fleet file";
                return Err(CliError::Usage(usage.to_owned()));
            }
            let item = |remote| FleetItem { remote, image: args.image.clone() };
            args.remotes.iter().cloned().map(item).collect()
        }
    };
    let mut requests: Vec<RelocateRequest> = Vec::new();
    for FleetItem { remote, image } in items {
        if requests.iter().any(|request| request.volume == remote.volume) {
            return Err(CliError::Usage(format!("{} would be relocated twice: name it once", remote.volume)));
        }
        requests.push(RelocateRequest {
            peer: remote.peer,
            volume: remote.volume,
            image: image.as_deref().map(absolute).transpose()?,
            bulk: args.bulk,
            bulk_rate_bytes_per_s: args.bulk_rate.and_then(|rate| rate.as_bytes_per_s()),
            take: args.take,
            overwrite: args.overwrite,
            timeout_s: args.timeout.map(|timeout| timeout.0.as_secs_f64()),
        });
    }
    Ok(requests)
}

async fn status(args: StatusArgs, console: &mut Console<'_>) -> Result<(), CliError> {
    let client = daemon::find(&args.daemon, console)?;
    if args.watch {
        let pace = Pace { poll: args.interval.0, ..console.pace };
        let look = async || look(&client, args.name.as_ref(), args.json.then_some(Layout::Line)).await;
        return follow::watch(look, pace, console).await;
    }
    let text = look(&client, args.name.as_ref(), args.json.then_some(Layout::Indented)).await?;
    console.say(text.trim_end())
}

/// How JSON is laid out.
#[derive(Clone, Copy)]
enum Layout {
    Line,
    Indented,
}

/// The site, or one volume, as a text.
async fn look(client: &ControlClient, name: Option<&Name>, json: Option<Layout>) -> Result<String, ClientError> {
    match name {
        Some(name) => {
            let status = client.volume(name).await?;
            Ok(json.map_or_else(|| show::volume(&status), |layout| as_json(&status, layout)))
        }
        None => {
            let status = client.status().await?;
            Ok(json.map_or_else(|| show::site(&status), |layout| as_json(&status, layout)))
        }
    }
}

/// A report came as JSON, so it can go as JSON.
fn as_json(report: &impl Serialize, layout: Layout) -> String {
    let text = match layout {
        Layout::Line => serde_json::to_string(report),
        Layout::Indented => serde_json::to_string_pretty(report),
    };
    text.unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }).to_string())
}

async fn prewarm(args: PrewarmArgs, console: &mut Console<'_>) -> Result<(), CliError> {
    let client = daemon::find(&args.daemon, console)?;
    let images = args.images.iter().map(|image| absolute(image)).collect::<Result<Vec<_>, _>>()?;
    let job = client.prewarm(images).await?;
    let status = follow::prewarm(&client, job, console).await?;
    let error = status.error.clone();
    if args.json {
        console.say_json(&PrewarmReport { job, status })?;
    } else {
        console.say(show::prewarmed(&status))?;
    }
    match error {
        Some(error) => Err(CliError::Failed(format!("prewarming ended early: {error}"))),
        None => Ok(()),
    }
}

/// The daemon has another working directory, and JSON has no paths that are not text.
fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    let absolute = std::path::absolute(path)
        .map_err(|error| CliError::Usage(format!("{:?} is no path: {error}", path.display().to_string())))?;
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err(CliError::Usage(format!("{} is not UTF-8: rename it, or use a link to it", path.display()))),
    }
}
