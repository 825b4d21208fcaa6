//! One task for each volume: drives its ownership machine, one input after the other, and answers whoever asked. It decides nothing.
//! Must not know how a record is kept, how a volume is served, or how a peer is reached: [`Keeper`] is the seam.
//!
//! Whoever wants something of a volume sends it to the volume's task. So nobody looks a volume up and then waits for its turn: a task that has
//! ended answers that there is no such volume. Questions of one peer are handled in the order in which they were sent.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::core::ids::Name;
use crate::handover::{
    Answer, Epoch, Facts, Held, Input, Job, Machine, No, Output, Question, Reply, Row, Ticket, Verb,
};

/// What could not be journalled is tried again this often.
const JOURNAL_AGAIN: Duration = Duration::from_secs(1);

/// What a machine's outputs mean at a site. Everything that returns a future is work that the volume's task waits for beside
/// others; what does not, takes effect before it returns.
pub trait Keeper: Send + Sync + 'static {
    /// What holds now.
    fn facts(&self) -> Facts;
    /// Makes a row durable.
    fn journal<'a>(&'a self, row: &'a Row) -> BoxFuture<'a, Result<(), String>>;
    /// Admits guests' writes.
    fn admit(&self);
    /// Admits none.
    fn bar(&self);
    /// Writes the cache back while guests write, until little is left.
    fn prepare(&self) -> BoxFuture<'static, Result<(), No>>;
    /// Waits for the writes under way, and syncs; `is_for_peer`: and sees that the image is what was announced.
    fn fence(&self, is_for_peer: bool) -> BoxFuture<'static, Result<(), No>>;
    /// Makes zeros of what never arrived, durably.
    fn fill(&self) -> BoxFuture<'static, Result<(), No>>;
    /// Asks a peer until it gives an answer that will not change by itself.
    fn ask(&self, peer: Name, question: Question) -> BoxFuture<'static, Answer>;
    /// Begins, or goes on, to bring what is missing. When it is all here, [`Custody::arrived`] is to be called.
    fn copy(&self);
    /// Brings nothing more.
    fn stop_copy(&self);
    /// All of it is here: peers may fetch it.
    fn offer(&self);
    /// Nothing of the volume is here any more.
    fn end(&self, with_image: bool) -> BoxFuture<'_, ()>;
}

/// A handle to a volume's task.
#[derive(Clone)]
pub struct Custody {
    inbox: UnboundedSender<Message>,
    view: Arc<Mutex<View>>,
    next_ticket: Arc<AtomicU32>,
}

/// What the task last knew.
#[derive(Clone, Debug)]
pub struct View {
    /// What is journalled.
    pub held: Held,
    /// To whom it is being handed over.
    pub handing_over_to: Option<Name>,
    /// Whether the last change is yet to be written.
    pub is_unsure: bool,
    /// Who could take it back.
    pub way_back: Option<Name>,
    /// Whether nothing of it is here any more.
    pub has_ended: bool,
}

impl View {
    fn of(machine: &Machine) -> View {
        View {
            held: machine.held().clone(),
            handing_over_to: machine.handing_over_to().cloned(),
            is_unsure: machine.is_unsure(),
            way_back: machine.way_back().cloned(),
            has_ended: machine.has_ended(),
        }
    }
}

enum Message {
    Begin { take: bool, timeout: Duration, slot: Operator },
    Told { verb: Verb, slot: Operator },
    Asked { ticket: Ticket, peer: Name, is_granted: bool, question: Question, slot: Peer },
    Plain(Input),
    Settled(oneshot::Sender<()>),
}

/// Somebody who waits, and must be told: dropping it tells that the site failed.
struct Slot<T> {
    reply: Option<oneshot::Sender<T>>,
    forgotten: fn() -> T,
}

type Operator = Slot<Result<Epoch, No>>;
type Peer = Slot<Answer>;

impl<T> Slot<T> {
    fn new(forgotten: fn() -> T) -> (Slot<T>, oneshot::Receiver<T>) {
        let (reply, answer) = oneshot::channel();
        (Slot { reply: Some(reply), forgotten }, answer)
    }

    fn send(mut self, answer: T) {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(answer);
        }
    }
}

impl<T> Drop for Slot<T> {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send((self.forgotten)());
        }
    }
}

fn no_answer() -> No {
    No::ShuttingDown
}

enum Waiting {
    Operator(Operator),
    Peer(Peer),
}

impl Custody {
    /// Starts the task, which carries out `first` before anything else. Must be called within a runtime. `made` makes the keeper: it may
    /// hold the handle.
    pub fn start<K: Keeper>(
        machine: Machine,
        first: Vec<Output>,
        made: impl FnOnce(&Custody) -> Arc<K>,
    ) -> (Custody, Arc<K>) {
        let (inbox, messages) = mpsc::unbounded_channel();
        let view = Arc::new(Mutex::new(View::of(&machine)));
        let custody = Custody {
            inbox,
            view: Arc::clone(&view),
            // 0 is nobody's.
            next_ticket: Arc::new(AtomicU32::new(1)),
        };
        let keeper = made(&custody);
        let task = Task {
            machine,
            keeper: Arc::clone(&keeper) as Arc<dyn Keeper>,
            view,
            next_ticket: Arc::clone(&custody.next_ticket),
            waiting: HashMap::new(),
            work: FuturesUnordered::new(),
            asking: None,
            deadline: None,
            again_at: None,
        };
        tokio::spawn(task.run(first, messages));
        (custody, keeper)
    }

    /// What the task last knew.
    pub fn view(&self) -> View {
        self.view.lock().clone()
    }

    /// Asks the source for a volume whose record says so; returns when this site owns it, or never will.
    pub async fn begin(&self, take: bool, timeout: Duration) -> Result<Epoch, No> {
        let (slot, answer) = Slot::new(|| Err(no_answer()));
        self.send(Message::Begin { take, timeout, slot });
        answer.await.unwrap_or(Err(No::Unknown))
    }

    /// What an operator wants; returns when it is done, or will not be.
    pub async fn tell(&self, verb: Verb) -> Result<Epoch, No> {
        let (slot, answer) = Slot::new(|| Err(no_answer()));
        self.send(Message::Told { verb, slot });
        answer.await.unwrap_or(Err(No::Unknown))
    }

    /// What a peer asks. It counts as asked when this returns; the answer comes later. Dropping that tells that nobody waits any more.
    pub fn ask(&self, peer: Name, is_granted: bool, question: Question) -> Asked {
        let (slot, answer) = Slot::new(|| Answer::Refused(None, no_answer()));
        let ticket = Ticket(self.next_ticket.fetch_add(1, Ordering::Relaxed));
        self.send(Message::Asked { ticket, peer, is_granted, question, slot });
        Asked { answer, hung: Some((self.inbox.clone(), ticket)) }
    }

    /// Returns when everything that was sent before has been seen to, what was to be done first included.
    pub async fn settled(&self) {
        let (reply, settled) = oneshot::channel();
        self.send(Message::Settled(reply));
        let _ = settled.await;
    }

    /// Every block is here, durably.
    pub fn arrived(&self) {
        self.send(Message::Plain(Input::Arrived));
    }

    /// A peer said which epoch holds there.
    pub fn heard(&self, peer: Name, epoch: Epoch) {
        self.send(Message::Plain(Input::Heard(peer, epoch)));
    }

    /// Whether another instance with this site's identity is about.
    pub fn doubt(&self, is_doubted: bool) {
        self.send(Message::Plain(Input::Doubted(is_doubted)));
    }

    fn send(&self, message: Message) {
        // If the task has ended, the message is dropped, and its slot with it: that answers.
        let _ = self.inbox.send(message);
    }
}

/// An answer to come.
#[must_use = "dropping it withdraws the question"]
pub struct Asked {
    answer: oneshot::Receiver<Answer>,
    hung: Option<(UnboundedSender<Message>, Ticket)>,
}

impl Future for Asked {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        Pin::new(&mut self.answer).poll(cx).map(|answer| {
            self.hung = None;
            answer.unwrap_or(Answer::Refused(None, no_answer()))
        })
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some((inbox, ticket)) = self.hung.take() {
            let _ = inbox.send(Message::Plain(Input::Hung(ticket)));
        }
    }
}

struct Task {
    machine: Machine,
    keeper: Arc<dyn Keeper>,
    view: Arc<Mutex<View>>,
    next_ticket: Arc<AtomicU32>,
    waiting: HashMap<Ticket, Waiting>,
    work: FuturesUnordered<BoxFuture<'static, Input>>,
    asking: Option<BoxFuture<'static, (Job, Answer)>>,
    deadline: Option<Instant>,
    /// When what could not be journalled is tried again.
    again_at: Option<Instant>,
}

impl Task {
    async fn run(mut self, first: Vec<Output>, mut messages: UnboundedReceiver<Message>) {
        self.carry_out(first).await;
        while !self.machine.has_ended() || self.machine.is_unsure() {
            let Some(input) = self.next(&mut messages).await else { return };
            let facts = self.keeper.facts();
            let outputs = self.machine.handle(input, &facts);
            self.carry_out(outputs).await;
        }
        // Who came too late hears that there is no such volume.
        messages.close();
        while let Some(message) = messages.recv().await {
            let input = self.take(message);
            let outputs = self.machine.handle(input, &Facts::default());
            self.carry_out(outputs).await;
        }
    }

    /// The next input; None when nobody can send one any more.
    async fn next(&mut self, messages: &mut UnboundedReceiver<Message>) -> Option<Input> {
        if !self.machine.is_unsure() {
            self.again_at = None;
        } else if self.again_at.is_none() {
            self.again_at = Some(Instant::now() + JOURNAL_AGAIN);
        }
        let (again_at, deadline) = (self.again_at, self.deadline);
        let asking = async {
            match &mut self.asking {
                Some(asking) => asking.await,
                None => std::future::pending().await,
            }
        };
        let at = async |at: Option<Instant>| match at {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        };
        tokio::select! {
            biased;
            // Before messages: who asks again and again must not keep it from being done.
            () = at(again_at) => {
                self.again_at = None;
                Some(Input::Tick)
            }
            Some(input) = self.work.next(), if !self.work.is_empty() => Some(input),
            (job, answer) = asking => {
                self.asking = None;
                Some(Input::Answered(job, answer))
            }
            message = messages.recv() => Some(self.take(message?)),
            () = at(deadline) => {
                self.deadline = None;
                Some(Input::Expired)
            }
        }
    }

    fn take(&mut self, message: Message) -> Input {
        match message {
            Message::Plain(input) => input,
            Message::Settled(reply) => {
                let _ = reply.send(());
                // Nothing happened; what is not journalled has its own clock.
                Input::Hung(Ticket(0))
            }
            Message::Begin { take, timeout, slot } => {
                self.deadline = Some(Instant::now() + timeout);
                Input::Begin(self.keep(Waiting::Operator(slot)), take)
            }
            Message::Told { verb, slot } => Input::Told(self.keep(Waiting::Operator(slot)), verb),
            Message::Asked { ticket, peer, is_granted, question, slot } => {
                self.waiting.insert(ticket, Waiting::Peer(slot));
                Input::Asked { ticket, peer, is_granted, question }
            }
        }
    }

    fn keep(&mut self, waiting: Waiting) -> Ticket {
        let ticket = Ticket(self.next_ticket.fetch_add(1, Ordering::Relaxed));
        self.waiting.insert(ticket, waiting);
        ticket
    }

    /// In their order. A failed journal holds back what follows it.
    async fn carry_out(&mut self, outputs: Vec<Output>) {
        // What is about to be journalled is shown to nobody before it is durable.
        if !self.machine.is_unsure() && !outputs.iter().any(|output| matches!(output, Output::Journal(_))) {
            *self.view.lock() = View::of(&self.machine);
        }
        let mut outputs = outputs.into_iter();
        while let Some(output) = outputs.next() {
            match output {
                Output::Journal(row) => {
                    if let Err(why) = self.keeper.journal(&row).await {
                        tracing::error!(
                            why,
                            "a change of ownership could not be journalled; it is tried again, and no write is admitted until then"
                        );
                        for output in self.machine.not_journalled(row, outputs.by_ref().collect()) {
                            debug_assert_eq!(output, Output::Bar);
                            self.keeper.bar();
                        }
                        self.view.lock().is_unsure = true;
                        return;
                    }
                    *self.view.lock() = View::of(&self.machine);
                }
                Output::Admit => self.keeper.admit(),
                Output::Bar => self.keeper.bar(),
                Output::Prepare(job) => {
                    let work = self.keeper.prepare();
                    self.work.push(Box::pin(async move { Input::Prepared(job, work.await) }));
                }
                Output::Fence { job, is_for_peer } => {
                    let work = self.keeper.fence(is_for_peer);
                    self.work.push(Box::pin(async move { Input::Fenced(job, work.await) }));
                }
                Output::Fill(job) => {
                    let work = self.keeper.fill();
                    self.work.push(Box::pin(async move { Input::Filled(job, work.await) }));
                }
                Output::Ask { job, peer, question } => {
                    let asking = self.keeper.ask(peer, question);
                    self.asking = Some(Box::pin(async move { (job, asking.await) }));
                }
                Output::StopAsking => self.asking = None,
                Output::Copy => {
                    self.deadline = None;
                    self.keeper.copy();
                }
                Output::StopCopy => self.keeper.stop_copy(),
                Output::Offer => self.keeper.offer(),
                Output::Reply(ticket, reply) => self.reply(ticket, reply),
                Output::End { with_image } => self.keeper.end(with_image).await,
            }
        }
    }

    fn reply(&mut self, ticket: Ticket, reply: Reply) {
        match (self.waiting.remove(&ticket), reply) {
            (Some(Waiting::Peer(slot)), Reply::Peer(answer)) => slot.send(answer),
            (Some(Waiting::Operator(slot)), Reply::Done(epoch)) => slot.send(Ok(epoch)),
            (Some(Waiting::Operator(slot)), Reply::No(no)) => slot.send(Err(no)),
            // Who hung up is not waited for by the machine, but may be answered all the same.
            (None, _) => {}
            (Some(_), reply) => tracing::error!(?reply, "an answer went to somebody who asked something else"),
        }
    }
}

#[cfg(test)]
mod tests;
