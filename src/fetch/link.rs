//! One peer's connections, one after the other: Hello, then everything that arrives is parsed, decompressed and verified
//! on the worker threads before the actor sees it. Must not know who waits for what.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{self, WeakUnboundedSender};

use super::{BULK_BUDGET_KIB, Budgeted, Command, Greeting, PeerKey};
use crate::core::frame::Frame;
use crate::core::ids::{BlockId, Name};
use crate::core::manifest::PageIndex;
use crate::core::wire::{Control, Data, Refusal, RootEntry, VERSIONS, WireError};
use crate::seeded_bugs::{Bug, is_planted};
use crate::transport::{LinkReceivers, NewLink};
use crate::workers::{Urgency, Workers};

const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages verified at a time.
const AT_A_TIME: usize = 16;

/// A data message after its checks.
pub(super) enum Arrived {
    /// A block whose bytes have this id.
    Block {
        flight: u64,
        id: BlockId,
        bytes: Bytes,
        frame: Option<Frame>,
        wire_bytes: u64,
        budget: Budgeted,
    },
    /// A block whose bytes do not: a damaged or lying source.
    Damaged {
        flight: u64,
        why: String,
    },
    Failed {
        flight: u64,
        refusal: Refusal,
        why: String,
    },
    Page {
        flight: u64,
        page: PageIndex,
        bytes: Bytes,
        frame: Frame,
    },
    Roots {
        flight: u64,
        first: PageIndex,
        entries: Vec<RootEntry>,
    },
}

impl Arrived {
    /// The number of what it answers.
    pub(super) fn flight(&self) -> u64 {
        match self {
            Arrived::Block { flight, .. }
            | Arrived::Damaged { flight, .. }
            | Arrived::Failed { flight, .. }
            | Arrived::Page { flight, .. }
            | Arrived::Roots { flight, .. } => *flight,
        }
    }
}

/// What this site says of itself first.
pub(super) struct Hello {
    pub(super) site: Name,
    pub(super) greeting: Arc<dyn Greeting>,
}

/// Follows a peer through its connections until the fetcher is gone.
pub(super) fn follow(
    peer: PeerKey,
    hello: Hello,
    mut links: mpsc::Receiver<NewLink>,
    workers: Workers,
    budget: Arc<Semaphore>,
    commands: WeakUnboundedSender<Command>,
) {
    tokio::spawn(async move {
        let mut generation = 0;
        while let Some(new) = links.recv().await {
            generation += 1;
            let link = Arc::clone(&new.link);
            let why = match run(peer, generation, &hello, new, &workers, &budget, &commands).await {
                Ok(()) => link.closed().await.to_string(),
                Err(why) => why,
            };
            link.close(&why);
            let Some(commands) = commands.upgrade() else { return };
            let _ = commands.send(Command::LinkLost { peer, generation, why });
        }
    });
}

async fn run(
    peer: PeerKey,
    generation: u64,
    hello: &Hello,
    new: NewLink,
    workers: &Workers,
    budget: &Arc<Semaphore>,
    commands: &WeakUnboundedSender<Command>,
) -> Result<(), String> {
    let NewLink { link, receivers: LinkReceivers { mut control, mut urgent, mut bulk } } = new;
    let (last, next) = hello.greeting.offer()?;
    let (min_version, max_version) = (*VERSIONS.start(), *VERSIONS.end());
    let first = Control::Hello { min_version, max_version, site: hello.site.clone(), last, next };
    link.send_control(first.encode()).await.map_err(|error| error.to_string())?;
    let answer = tokio::time::timeout(WELCOME_TIMEOUT, control.recv());
    match answer.await.map_err(|_| "the peer accepted the connection and then said nothing for 10 seconds")? {
        Some(frame) => match Control::decode(frame).map_err(|error| error.to_string())? {
            Control::Welcome { version, .. } if VERSIONS.contains(&version) => hello.greeting.accepted(),
            Control::Welcome { version, .. } => return Err(format!("the peer chose protocol version {version}")),
            Control::Unwelcome { refusal: Refusal::Clone, why } => {
                hello.greeting.turned_away(&why);
                return Err(why);
            }
            Control::Unwelcome { why, .. } => return Err(why),
            _ => return Err("the peer's first frame was no Welcome".into()),
        },
        None => return Err(link.closed().await.to_string()),
    }
    send(commands, Command::Link { peer, generation, new: Arc::clone(&link) });
    let controls = async {
        while let Some(frame) = control.recv().await {
            let frame = Control::decode(frame).map_err(|error| error.to_string())?;
            send(commands, Command::Control { peer, generation, frame });
        }
        Ok(())
    };
    let urgent_data = verify(peer, generation, &mut urgent, Urgency::Urgent, None, workers, commands);
    let bulk_data = verify(peer, generation, &mut bulk, Urgency::Background, Some(budget), workers, commands);
    // Whichever ends first ends the connection: the other streams are of no use without it.
    tokio::select! {
        biased;
        end = controls => end,
        end = urgent_data => end,
        end = bulk_data => end,
    }
}

async fn verify(
    peer: PeerKey,
    generation: u64,
    messages: &mut mpsc::Receiver<Bytes>,
    urgency: Urgency,
    budget: Option<&Arc<Semaphore>>,
    workers: &Workers,
    commands: &WeakUnboundedSender<Command>,
) -> Result<(), String> {
    let mut under_way = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            Some(checked) = under_way.next(), if !under_way.is_empty() => {
                let message = checked?;
                send(commands, Command::Arrived { peer, generation, message });
            }
            message = messages.recv(), if under_way.len() < AT_A_TIME => {
                let Some(message) = message else { return Ok(()) };
                // Each waits for memory by itself: those that have theirs must get on, or several peers could wait for
                // each other.
                under_way.push(async move {
                    let permit = match budget {
                        Some(budget) => {
                            let kib = (Data::raw_len_bytes(&message) as usize).div_ceil(1024).min(BULK_BUDGET_KIB);
                            let permit = Arc::clone(budget).acquire_many_owned(kib as u32).await;
                            Some(Arc::new(permit.map_err(|error| error.to_string())?))
                        }
                        None => None,
                    };
                    let checked = workers.run(urgency, move || check(message, permit)).await;
                    checked.ok_or("a check failed inside")?.map_err(|error| error.to_string())
                });
            }
        }
    }
}

fn check(message: Bytes, budget: Budgeted) -> Result<Arrived, WireError> {
    let wire_bytes = message.len() as u64;
    Ok(match Data::decode(message)? {
        Data::Block { flight, id, frame: None } => {
            Arrived::Block { flight, id, bytes: Bytes::new(), frame: None, wire_bytes, budget }
        }
        Data::Block { flight, id, frame: Some(frame) } if is_planted(Bug::FailureAsZeros) => {
            let zeros = || Bytes::from(vec![0; frame.raw_len_bytes as usize]);
            let bytes = frame.decode_verified(&id).unwrap_or_else(|_| zeros());
            Arrived::Block { flight, id, bytes, frame: Some(frame), wire_bytes, budget }
        }
        Data::Block { flight, id, frame: Some(frame) } if is_planted(Bug::AnswerNotVerified) => match frame.decode() {
            Ok(bytes) => Arrived::Block { flight, id, bytes, frame: Some(frame), wire_bytes, budget },
            Err(error) => Arrived::Damaged { flight, why: error.to_string() },
        },
        Data::Block { flight, id, frame: Some(frame) } => match frame.decode_verified(&id) {
            Ok(bytes) => Arrived::Block { flight, id, bytes, frame: Some(frame), wire_bytes, budget },
            Err(error) => Arrived::Damaged { flight, why: error.to_string() },
        },
        Data::Failed { flight, refusal, why } => Arrived::Failed { flight, refusal, why },
        Data::Page { flight, page, frame } => match frame.decode() {
            Ok(bytes) => Arrived::Page { flight, page, bytes, frame },
            Err(error) => Arrived::Damaged { flight, why: error.to_string() },
        },
        Data::Roots { flight, first, entries } => Arrived::Roots { flight, first, entries },
    })
}

fn send(commands: &WeakUnboundedSender<Command>, command: Command) {
    if let Some(commands) = commands.upgrade() {
        let _ = commands.send(command);
    }
}
