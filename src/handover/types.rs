//! What the ownership machine is told, what it says, and what is journalled of it. Must not know how any of it is done.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Epoch, No};
use crate::core::ids::Name;

/// What is journalled of a volume's ownership at one site.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    /// When the ownership last changed, as far as this site knows.
    pub epoch: Epoch,
    /// Who owns it, and how far it is.
    pub state: State,
    /// Where it came from, if it came. That site may take it back by a person's decision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub came: Option<Came>,
    /// Other sites that had it once and may have kept it: whoever got it from here, and whoever took it by a person's decision. A person
    /// may decide there, too.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub lent: BTreeSet<Name>,
}

impl Held {
    /// Of a volume that no other site had.
    pub fn new(epoch: Epoch, state: State) -> Held {
        Held { epoch, state, came: None, lent: BTreeSet::new() }
    }

    /// All sites that have to do with it. A person's decision is believed of them alone.
    pub fn knows(&self, peer: &Name) -> bool {
        self.lent.contains(peer)
            || self.came.as_ref().is_some_and(|came| came.from == *peer)
            || matches!(
                &self.state,
                State::Asking { from: one }
                | State::Arriving { from: one }
                | State::GivingBack { from: one, .. }
                | State::Released { to: one, .. }
                | State::Fenced { by: one, .. } if one == peer
            )
    }

    /// Whether it came, or is coming, from a peer: what that peer says of this site's instance concerns it.
    pub fn is_from(&self, peer: &Name) -> bool {
        self.came.as_ref().is_some_and(|came| came.from == *peer)
            || matches!(&self.state, State::Asking { from } if from == peer)
    }

    /// Who could take the volume back: it is still what this site took over, or asks for.
    pub fn way_back(&self) -> Option<&Name> {
        match (&self.state, &self.came) {
            (State::Arriving { from } | State::Asking { from } | State::GivingBack { from, .. }, _) => Some(from),
            (State::Owned, Some(came)) if came.epoch == self.epoch => Some(&came.from),
            _ => None,
        }
    }

    /// The others, for what is remembered when nothing is here any more.
    pub(super) fn others(&self) -> BTreeSet<Name> {
        self.lent.iter().chain(self.came.as_ref().map(|came| &came.from)).cloned().collect()
    }
}

/// Where a volume came from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Came {
    /// The site that it came from.
    pub from: Name,
    /// The epoch at which this site took it over. As long as it holds, the volume can be given back.
    pub epoch: Epoch,
}

/// Who owns a volume. One variant for each real state.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum State {
    /// This site owns it, and all of it is here.
    Owned,
    /// `to` owns it since the epoch. What it was then is here.
    Released {
        /// The owner.
        to: Name,
        /// Whether the owner has every block.
        is_completed: bool,
    },
    /// The source was, or is about to be, asked for it. This site does not own it.
    Asking {
        /// The source.
        from: Name,
    },
    /// This site owns it. Blocks are missing.
    Arriving {
        /// The source.
        from: Name,
    },
    /// This site does not own it any more, or never did. The source is asked to take it until it answers.
    GivingBack {
        /// The source.
        from: Name,
        /// Whether this site owned it.
        was_owner: bool,
        /// Whether all of it is here.
        is_complete: bool,
    },
    /// Another site owns it by a person's decision. Nothing is served here.
    Fenced {
        /// The site where the person decided.
        by: Name,
        /// Whether all of it is here.
        is_complete: bool,
    },
}

impl State {
    /// Whether guests may write it here.
    pub fn is_owner(&self) -> bool {
        matches!(self, State::Owned | State::Arriving { .. })
    }

    /// Why a peer may not fetch it from here.
    pub fn withholds_from(&self, peer: &Name) -> Option<No> {
        match self {
            State::Owned => None,
            State::Released { to, .. } if to == peer => None,
            State::Released { to: owner, .. } | State::Fenced { by: owner, .. } => Some(No::OwnedBy(owner.clone())),
            State::Asking { from } | State::Arriving { from } => Some(No::Arriving(from.clone())),
            State::GivingBack { from, .. } => Some(No::GivingBack(from.clone())),
        }
    }

    /// Why guests are not served here, not even to read. A hypervisor opens its disk before the hand-over that lets it write.
    pub fn not_served(&self) -> Option<String> {
        match self {
            State::Asking { from } => Some(format!("{from} has not handed it over yet")),
            State::GivingBack { from, .. } => Some(format!("it is being given back to {from}")),
            State::Fenced { by, .. } => Some(format!("it was reclaimed at {by}, and is not served here any more")),
            State::Owned | State::Arriving { .. } | State::Released { .. } => None,
        }
    }

    /// Whether every block is in the image here.
    pub fn is_complete(&self) -> bool {
        match self {
            State::Owned | State::Released { .. } => true,
            State::Asking { .. } | State::Arriving { .. } => false,
            State::GivingBack { is_complete, .. } | State::Fenced { is_complete, .. } => *is_complete,
        }
    }
}

/// Something that a peer is to be told until it has answered, whatever becomes of the volume here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Debt {
    /// Whom.
    pub peer: Name,
    /// What.
    pub what: Owed,
    /// The epoch that it speaks of.
    pub epoch: Epoch,
}

/// What can be owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owed {
    /// Every block of what it released at the epoch is here.
    Completed,
    /// A person reclaimed the volume here at the epoch: the peer owns it no more.
    Reclaimed,
}

/// What is remembered of a volume that is not here any more.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Left {
    /// Where it is, if it went to another site.
    pub to: Option<Name>,
    /// The last epoch that was seen of it: a volume of the same name begins after it.
    pub epoch: Epoch,
    /// Other sites that had it: where it is has to hear of what a person decides there.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub known: BTreeSet<Name>,
}

/// One durable change. All of it or nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// What holds from now on; None: nothing is here any more.
    pub held: Option<Held>,
    /// What is remembered if nothing is here any more.
    pub left: Option<Left>,
    /// What is owed from now on.
    pub owes: Option<Debt>,
    /// Whether the image's content counts as another from now on: guests may have changed what was announced.
    pub is_new_content: bool,
}

/// The number of somebody who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u32);

/// The number of a piece of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Job(pub u32);

/// What holds outside the machine while it decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Facts {
    /// NBD clients that are connected here.
    pub clients: u32,
    /// Whether a guest's write was acknowledged here since the volume came.
    pub is_written: bool,
    /// How much, at least.
    pub written_bytes: u64,
    /// Whether the image is open.
    pub has_image: bool,
}

/// What a peer asks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Question {
    /// To own it from `epoch` on; `take`: although clients are connected.
    TakeOver {
        /// The epoch that is to begin.
        epoch: Epoch,
        /// Whether a person said so.
        take: bool,
    },
    /// That its ownership at `epoch` ends, or is never to begin.
    GiveBack {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// That it be noted that every block has arrived.
    Completed {
        /// The epoch of the hand-over.
        epoch: Epoch,
    },
    /// That it be noted that a person reclaimed the volume at `epoch`.
    Reclaimed {
        /// The epoch that begins.
        epoch: Epoch,
    },
}

impl Question {
    /// The epoch that it speaks of.
    pub fn epoch(&self) -> Epoch {
        match self {
            Question::TakeOver { epoch, .. }
            | Question::GiveBack { epoch }
            | Question::Completed { epoch }
            | Question::Reclaimed { epoch } => *epoch,
        }
    }
}

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Yes; the epoch that holds now at the answering site.
    Done(Epoch),
    /// No; the epoch that holds at the answering site, if it knows the volume.
    Refused(Option<Epoch>, No),
}

/// What an operator asks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Not to serve it here any more. Its image stays.
    Remove,
    /// To give a relocation up; `discard`: with what guests wrote here.
    Cancel {
        /// Whether guests' writes may be thrown away.
        discard: bool,
    },
    /// A person's decision at this epoch: the other side is lost for good.
    Reclaim {
        /// The epoch that the person saw.
        epoch: Epoch,
        /// Drawn at random: tells this decision from another one, at another site.
        salt: u16,
    },
}

/// What the machine is told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// A relocation to here begins; the record says [`State::Asking`] already. `take` as in [`Question::TakeOver`].
    Begin(Ticket, bool),
    /// A peer asks. `is_granted`: the configuration lets this peer have this volume.
    Asked {
        /// Who waits for the answer.
        ticket: Ticket,
        /// Who asks.
        peer: Name,
        /// Whether it may have the volume.
        is_granted: bool,
        /// What it asks.
        question: Question,
    },
    /// Who asked is gone.
    Hung(Ticket),
    /// An operator asks.
    Told(Ticket, Verb),
    /// [`Output::Prepare`] has ended.
    Prepared(Job, Result<(), No>),
    /// [`Output::Fence`] has ended.
    Fenced(Job, Result<(), No>),
    /// [`Output::Fill`] has ended.
    Filled(Job, Result<(), No>),
    /// The peer answered [`Output::Ask`].
    Answered(Job, Answer),
    /// The time for the hand-over is over.
    Expired,
    /// Every block is here, durably.
    Arrived,
    /// The source says, without having been asked, which epoch holds there.
    Heard(Name, Epoch),
    /// Another instance with this site's identity is about (true), or is not (false).
    Doubted(bool),
    /// A moment has passed: what could not be journalled is tried again.
    Tick,
}

/// What the machine wants done, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Make this durable. If that fails, what follows is not done, and [`super::Machine::not_journalled`] gets both.
    Journal(Row),
    /// Admit guests' writes.
    Admit,
    /// Admit none from now on.
    Bar,
    /// Write the cache back while guests write, until little is left of it.
    Prepare(Job),
    /// Admit no write, wait for those under way, sync, and see that the image is what was announced. `is_for_peer`: a peer relies on
    /// the content; else only on the end of the writes.
    Fence {
        /// Its number.
        job: Job,
        /// See above.
        is_for_peer: bool,
    },
    /// Make zeros of what never arrived, durably.
    Fill(Job),
    /// Ask a peer until it answers. One question at a time: it replaces the one before.
    Ask {
        /// Its number.
        job: Job,
        /// Whom.
        peer: Name,
        /// What.
        question: Question,
    },
    /// The answer does not matter any more.
    StopAsking,
    /// Begin, or go on, to bring what is missing.
    Copy,
    /// Bring nothing more.
    StopCopy,
    /// All of it is here: peers may fetch it from here.
    Offer,
    /// Somebody's answer.
    Reply(Ticket, Reply),
    /// Nothing of the volume is here any more. `with_image`: and the file that was made for it is not needed.
    End {
        /// Whether to delete what was made.
        with_image: bool,
    },
}

/// The answer to whoever waits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// To a peer.
    Peer(Answer),
    /// To an operator: done, and the epoch that holds.
    Done(Epoch),
    /// To an operator: not done.
    No(No),
}
