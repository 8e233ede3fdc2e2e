//! The step thread's side: the engine, between the inbox and the delivery thread.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use slora_core::{AdapterId, AdapterInfo, AdapterSpec, AdapterState, Counts, Engine, Events, LoadFailure, RequestId};
use slora_store::Adapter;

use crate::delivery::Message;
use crate::error::RegisterError;
use crate::host::HostMemory;
use crate::inbox::Command;
use crate::loader::Loader;
use crate::output::TokenLogprobs;
use crate::runtime::{AdapterDetails, Shared, Snapshot};

/// Log-probabilities that a step brought, in the order of the plan's rows; empty: not asked for.
#[derive(Clone, Debug, Default)]
pub struct StepLogprobs {
    /// Of each sampled token.
    pub chosen: Vec<f32>,
    /// Best ids of each sampled row.
    pub best_ids: Vec<i32>,
    /// Their log-probabilities.
    pub best: Vec<f32>,
    /// Of each prompt target.
    pub prompt: Vec<f32>,
    /// Best ids of each prompt row.
    pub prompt_best_ids: Vec<i32>,
    /// Their log-probabilities.
    pub prompt_best: Vec<f32>,
}

impl StepLogprobs {
    pub(crate) fn sampled(&self, row: usize, token: u32, wanted: u32) -> TokenLogprobs {
        position(token, &self.chosen, &self.best_ids, &self.best, row, wanted)
    }

    pub(crate) fn prompt(&self, row: usize, token: u32, wanted: u32) -> TokenLogprobs {
        position(token, &self.prompt, &self.prompt_best_ids, &self.prompt_best, row, wanted)
    }
}

fn position(token: u32, chosen: &[f32], best_ids: &[i32], best: &[f32], row: usize, wanted: u32) -> TokenLogprobs {
    let logprob = chosen.get(row).copied().unwrap_or(f32::NAN);
    let width = best_ids.len() / chosen.len().max(1);
    let start = row * width;
    let end = start + width.min(wanted as usize);
    let best = best_ids
        .get(start..end)
        .unwrap_or_default()
        .iter()
        .zip(best.get(start..end).unwrap_or_default())
        .map(|(id, logprob)| (*id as u32, *logprob))
        .collect();
    TokenLogprobs { token, logprob, best }
}

/// Owns the engine. Every call comes from the one thread that runs steps.
pub struct Stepper {
    engine: Engine,
    adapters: HashMap<AdapterId, Arc<Adapter>>,
    host: HostMemory,
    loader: Loader,
    delivery: SyncSender<Message>,
    shared: Arc<Shared>,
    epoch: Instant,
    commands: Vec<Command>,
    snapshot: Snapshot,
    /// Steps with copies that have not arrived, and when they were planned.
    copying: VecDeque<(u32, Instant)>,
}

impl Stepper {
    pub(crate) fn new(
        engine: Engine,
        host: HostMemory,
        loader: Loader,
        delivery: SyncSender<Message>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            engine,
            adapters: HashMap::new(),
            host,
            loader,
            delivery,
            shared,
            epoch: Instant::now(),
            commands: Vec::new(),
            snapshot: Snapshot::default(),
            copying: VecDeque::new(),
        }
    }

    /// The engine, for its configuration and layout.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    fn now_us(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }

    /// Takes commands and plans the next step into `buffer`. `None`: nothing to run before something happens; see
    /// [`Runtime::wait`](crate::Runtime::wait).
    pub fn schedule(&mut self, buffer: &mut [i32]) -> Option<Counts> {
        self.take_commands();
        let counts = self.engine.schedule(self.now_us(), buffer);
        self.start_loads();
        if let Some(counts) = &counts {
            if counts.num_rows > 0 {
                self.shared.timings().step_rows.observe(f64::from(counts.num_rows));
            }
            if counts.num_copies > 0 {
                self.copying.push_back((counts.step, Instant::now()));
            }
        }
        self.publish(StepLogprobs::default());
        counts
    }

    /// Takes what a launched step sampled; see [`Engine::commit`].
    pub fn commit(&mut self, step: u32, sampled: &[i32], logprobs: StepLogprobs) {
        self.engine.commit(self.now_us(), step, sampled);
        self.publish(logprobs);
    }

    /// The page copies of all steps up to this one have arrived.
    pub fn copies_done(&mut self, step: u32) {
        self.engine.copies_done(step);
        while let Some((copied, since)) = self.copying.front().copied()
            && copied <= step
        {
            self.copying.pop_front();
            self.shared.timings().host_loads.observe(since.elapsed().as_secs_f64());
        }
    }

    fn take_commands(&mut self) {
        let mut commands = std::mem::take(&mut self.commands);
        self.shared.inbox.drain(&mut commands);
        // The delivery thread knows every request before the engine does: whatever happens here, none is lost.
        for command in &commands {
            if let Command::Submit(_, channel) = command {
                self.send(Message::Open(channel.clone()));
            }
        }
        let now_us = self.now_us();
        for command in commands.drain(..) {
            match command {
                Command::Submit(request, _) => {
                    let (id, adapter) = (request.id, request.adapter.clone());
                    let message = match self.engine.submit(now_us, request) {
                        Ok(()) => self.accepted(id, adapter.as_deref()),
                        Err(error) => Message::Refused(id, error.into()),
                    };
                    self.send(message);
                }
                Command::Cancel(id) => {
                    self.engine.cancel(id);
                }
                Command::Checked(id, num_tokens) => self.engine.checked(id, num_tokens),
                Command::Loaded(id, result, elapsed) => {
                    self.snapshot.load_us += elapsed.as_micros() as u64;
                    let code = result.as_ref().err().map(|failure| failure.code);
                    self.shared.timings().observe_disk_load(elapsed, code);
                    match result {
                        Ok(()) => {
                            self.engine.load_finished(id);
                            self.send(Message::Loaded(id));
                        }
                        Err(failure) => self.engine.load_failed(id, failure),
                    }
                }
                Command::Call(call) => call(self),
            }
        }
        self.commands = commands;
    }

    /// What the name means at submit is what the request is bound to.
    fn accepted(&self, id: RequestId, adapter: Option<&str>) -> Message {
        let info = adapter.and_then(|name| self.engine.adapter_info(name));
        if let Some(info) = &info {
            let lookups = &mut self.shared.timings().lookups;
            match info.state {
                AdapterState::Resident => lookups.device += 1,
                AdapterState::Host => lookups.host += 1,
                _ => lookups.disk += 1,
            }
        }
        let is_loaded = |info: &AdapterInfo| matches!(info.state, AdapterState::Host | AdapterState::Resident);
        Message::Accepted {
            id,
            version: info.as_ref().map_or(0, |info| info.version),
            awaited: info.filter(|info| !is_loaded(info)).map(|info| info.id),
        }
    }

    fn start_loads(&mut self) {
        while let Some(id) = self.engine.next_cancelled_load() {
            self.loader.cancel(id);
        }
        while let Some(load) = self.engine.next_load() {
            let Some(adapter) = self.adapters.get(&load.adapter) else {
                let message = "its checkpoint is no longer known".into();
                self.engine.load_failed(load.adapter, LoadFailure { code: "internal", message });
                continue;
            };
            let num_slabs = self.host.num_slabs_of(&load.pages);
            self.loader.start(load.adapter, adapter.clone(), self.host.pages(&load.pages), num_slabs);
        }
        while let Some(id) = self.engine.next_dropped() {
            self.adapters.remove(&id);
        }
    }

    /// Shows changed adapters to everybody.
    fn publish_adapters(&mut self) {
        let (engine, adapters) = (&mut self.engine, &self.adapters);
        let changes = std::iter::from_fn(|| engine.next_changed_adapter());
        self.shared.directory.update(changes.map(|(name, info)| {
            let details = info.map(|info| AdapterDetails { checkpoint: adapters.get(&info.id).cloned(), info });
            (name, details)
        }));
    }

    /// Hands over what happened, behind the adapters and the statistics that include it.
    fn publish(&mut self, logprobs: StepLogprobs) {
        self.publish_adapters();
        self.snapshot.engine = self.engine.stats();
        self.shared.publish(self.snapshot.clone());
        let mut events = Events::default();
        self.engine.take_events(&mut events);
        if !events.is_empty() {
            self.send(Message::Events(events, logprobs));
        }
    }

    fn send(&self, message: Message) {
        // The delivery thread ends after the last step only.
        let _ = self.delivery.send(message);
    }

    pub(crate) fn register(
        &mut self,
        name: Arc<str>,
        adapter: Adapter,
        replace: bool,
        pinned: bool,
    ) -> Result<AdapterDetails, RegisterError> {
        let spec = AdapterSpec {
            num_pages: adapter.num_pages(),
            bytes: adapter.bytes(),
            words: adapter.words(),
            page_layers: adapter.page_layers(),
        };
        let id = self.engine.register(name.clone(), spec, replace)?;
        let adapter = Arc::new(adapter);
        self.adapters.insert(id, adapter.clone());
        if pinned {
            self.engine.pin(&name)?;
        }
        self.publish_adapters();
        let details = self.shared.directory.get(&name).ok_or(slora_core::AdapterError::Unknown(name))?;
        Ok(AdapterDetails { checkpoint: Some(adapter), ..details })
    }

    pub(crate) fn unload(&mut self, name: &str) -> Result<(), slora_core::AdapterError> {
        self.engine.unload(name)?;
        self.publish_adapters();
        Ok(())
    }

    pub(crate) fn pin(&mut self, name: &str, is_pinned: bool) -> Result<(), slora_core::AdapterError> {
        let pin = if is_pinned { Engine::pin } else { Engine::unpin };
        pin(&mut self.engine, name)?;
        self.publish_adapters();
        Ok(())
    }

    pub(crate) fn close(&mut self) {
        self.loader.close();
    }
}
