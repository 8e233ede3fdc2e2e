//! The delivery thread: a step's events → the requests' channels.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use slora_core::{AdapterId, EndReason, Events, RequestId};

use crate::error::RequestError;
use crate::inbox::{Command, Inbox};
use crate::output::{Channel, End, TextProgress, TokenLogprobs};
use crate::stepper::StepLogprobs;

/// Messages that may wait for the delivery thread; then the step thread waits for it.
const MAX_MESSAGES: usize = 4096;

/// What the step thread hands over.
pub(crate) enum Message {
    /// A request that the engine is about to be asked to take.
    Open(Arc<Channel>),
    /// It has, and bound this version of its adapter (0: the base), which may have to be loaded first.
    Accepted { id: RequestId, version: u32, awaited: Option<AdapterId> },
    /// This adapter has reached the host tier.
    Loaded(AdapterId),
    /// It has not.
    Refused(RequestId, RequestError),
    /// What happened in a step.
    Events(Events, StepLogprobs),
    /// Every request ends.
    EndAll(RequestError),
    /// The thread ends.
    Stop,
}

/// The thread and the way to it.
pub(crate) struct Delivery {
    sender: SyncSender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Delivery {
    pub fn new(inbox: Arc<Inbox>) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(MAX_MESSAGES);
        let requests = Requests { open: HashMap::new(), stopped: None, inbox };
        let thread =
            std::thread::Builder::new().name("slora-delivery".into()).spawn(move || requests.run(&receiver))?;
        Ok(Self { sender, thread: Some(thread) })
    }

    pub fn sender(&self) -> SyncSender<Message> {
        self.sender.clone()
    }

    pub fn close(&mut self) {
        let _ = self.sender.send(Message::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.close();
    }
}

/// The unfinished requests.
struct Requests {
    open: HashMap<RequestId, Arc<Channel>>,
    /// Why every request that still comes ends at once.
    stopped: Option<RequestError>,
    inbox: Arc<Inbox>,
}

impl Requests {
    fn run(mut self, receiver: &Receiver<Message>) {
        while let Ok(message) = receiver.recv() {
            match message {
                Message::Open(channel) => self.open(channel),
                Message::Accepted { id, version, awaited } => {
                    if let Some(channel) = self.open.get(&id) {
                        channel.accept(version, awaited);
                    }
                }
                Message::Loaded(adapter) => self.open.values().for_each(|channel| channel.loaded(adapter)),
                Message::Refused(id, error) => {
                    if let Some(channel) = self.open.remove(&id) {
                        channel.end(End::Error(error));
                    }
                }
                Message::Events(events, logprobs) => self.deliver(events, &logprobs),
                Message::EndAll(error) => {
                    self.open.drain().for_each(|(_, channel)| channel.end(End::Error(error.clone())));
                    self.stopped = Some(error);
                }
                Message::Stop => return,
            }
        }
    }

    fn open(&mut self, channel: Arc<Channel>) {
        match &self.stopped {
            None => {
                self.open.insert(channel.id(), channel);
            }
            Some(error) => channel.end(End::Error(error.clone())),
        }
    }

    fn deliver(&mut self, events: Events, logprobs: &StepLogprobs) {
        for end in &events.ended {
            if let Some(channel) = self.open.get(&end.request) {
                channel.begin_end(matches!(end.reason, EndReason::Stop(_)));
            }
        }
        let now = Instant::now();
        for id in &events.admitted {
            if let Some(channel) = self.open.get(id) {
                channel.admit(now);
            }
        }
        for event in &events.prompts {
            let Some(channel) = self.open.get(&event.request) else { continue };
            let wanted = channel.spec.num_prompt_logprobs.unwrap_or(0);
            let targets = channel.spec.prompt[event.position as usize..].iter().take(event.len as usize);
            let found = (event.row as usize..).zip(targets);
            channel.push_prompt_logprobs(found.map(|(row, token)| logprobs.prompt(row, *token, wanted)));
        }
        for event in &events.tokens {
            let Some(channel) = self.open.get(&event.request) else { continue };
            let found: Option<TokenLogprobs> =
                channel.spec.num_logprobs.map(|wanted| logprobs.sampled(event.row as usize, event.token, wanted));
            let command = match channel.push(event.token, found, now) {
                TextProgress::Quiet => continue,
                TextProgress::Checked(num_tokens) => Command::Checked(event.request, num_tokens),
                TextProgress::Ended => Command::Cancel(event.request),
            };
            // A closed inbox: the engine has ended every request.
            let _ = self.inbox.push(command);
        }
        for end in events.ended {
            if let Some(channel) = self.open.remove(&end.request) {
                channel.end_by(end.reason);
            }
        }
    }
}
