//! What everybody but the step thread holds.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use slora_core::{AdapterInfo, ConfigError, Engine, EngineConfig, NewRequest, RequestId, SubmitError};
use slora_store::{Adapter, BaseSpec, Report};
use slora_text::TextModel;

use crate::delivery::{Delivery, Message};
use crate::directory::Directory;
use crate::error::{RegisterError, RequestError};
use crate::host::HostMemory;
use crate::inbox::{Command, Inbox, Refused};
use crate::loader::{self, Loader};
use crate::output::{Channel, ChannelSpec, End, Output};
use crate::stepper::Stepper;
use crate::submission::Submission;
use crate::timings::Timings;

/// What the runtime is told once.
#[derive(Debug)]
pub struct RuntimeConfig {
    /// The engine's sizes and limits; host pages follow from the host memory.
    pub engine: EngineConfig,
    /// The base model, as adapters see it; its page limit is the engine's.
    pub base: BaseSpec,
    /// Threads that pack adapters.
    pub num_loaders: usize,
    /// Of random numbers of requests that bring no seed.
    pub seed: u64,
}

/// Whether the runtime works.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It does.
    #[default]
    Running,
    /// A step failed, for this reason: every request has ended and no more are taken.
    Failed(Arc<str>),
    /// It was closed.
    Closed,
}

/// Counters and gauges, as of the last step.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The engine's.
    pub engine: slora_core::Stats,
    /// Time that loads from disk took, in microseconds, summed up.
    pub load_us: u64,
}

/// An adapter as its name means it now.
#[derive(Clone, Debug)]
pub struct AdapterDetails {
    /// The engine's view.
    pub info: AdapterInfo,
    /// The checkpoint: tensor accounting, ranks, files.
    pub checkpoint: Option<Arc<Adapter>>,
}

/// What client threads and the step thread share.
pub(crate) struct Shared {
    pub inbox: Arc<Inbox>,
    pub directory: Directory,
    state: Mutex<State>,
    snapshot: Mutex<Snapshot>,
    timings: Mutex<Timings>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn timings(&self) -> MutexGuard<'_, Timings> {
        self.timings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn publish(&self, snapshot: Snapshot) {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }
}

/// The clients' side of an engine; every call may come from any thread.
pub struct Runtime {
    shared: Arc<Shared>,
    config: EngineConfig,
    base: BaseSpec,
    text: Option<Arc<TextModel>>,
    seed: u64,
    next_id: AtomicU64,
    loads: Arc<loader::Shared>,
    delivery: Mutex<Delivery>,
    messages: mpsc::SyncSender<Message>,
}

impl Runtime {
    /// Longest name of an adapter, in bytes.
    pub const MAX_NAME_LEN: usize = 128;

    /// Starts loaders and the delivery thread. The stepper goes to the thread that runs steps.
    ///
    /// # Errors
    /// A configuration with which no engine works.
    ///
    /// # Panics
    /// If the system cannot start a thread.
    pub fn new(
        config: RuntimeConfig,
        host: HostMemory,
        text: Option<Arc<TextModel>>,
    ) -> Result<(Self, Stepper), ConfigError> {
        let RuntimeConfig { engine, mut base, num_loaders, seed } = config;
        let engine = Engine::new(EngineConfig { num_host_pages: host.num_pages(), ..engine })?;
        base.max_adapter_pages = engine.config().max_adapter_pages;
        let inbox = Arc::new(Inbox::default());
        let (directory, state, snapshot, timings) = Default::default();
        let shared = Arc::new(Shared { inbox: inbox.clone(), directory, state, snapshot, timings });
        let num_ready_slabs = host.num_ready_slabs();
        let started = Delivery::new(inbox.clone())
            .and_then(|delivery| Ok((delivery, Loader::new(num_loaders, num_ready_slabs, inbox)?)));
        let Ok((delivery, loader)) = started else { panic!("the system cannot start a thread") };
        let messages = delivery.sender();
        let (config, loads) = (engine.config().clone(), loader.shared());
        let stepper = Stepper::new(engine, host, loader, messages.clone(), shared.clone());
        let (next_id, delivery) = (AtomicU64::new(1), Mutex::new(delivery));
        Ok((Self { shared, config, base, text, seed, next_id, loads, delivery, messages }, stepper))
    }

    /// The engine's configuration, with limits lowered to what can be reached.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The base model, as adapters see it.
    pub fn base(&self) -> &BaseSpec {
        &self.base
    }

    /// The model folder's text side, if it has a tokenizer.
    pub fn text(&self) -> Option<&Arc<TextModel>> {
        self.text.as_ref()
    }

    /// Whether requests are taken.
    pub fn state(&self) -> State {
        self.shared.state().clone()
    }

    /// Counters and gauges, as of the last step.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was measured so far.
    pub fn timings(&self) -> Timings {
        self.shared.timings().clone()
    }

    fn stopped(&self) -> RequestError {
        match self.state() {
            State::Failed(reason) => RequestError::EngineFailed(reason),
            _ => RequestError::Closed,
        }
    }

    /// Queues a request. What only the engine can refuse, such as an unknown adapter, comes as the request's end.
    ///
    /// # Errors
    /// Stop strings that cannot be looked for, too many requests on their way, a stopped engine.
    pub fn submit(&self, submission: Submission) -> Result<Output, RequestError> {
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let Submission { prompt, adapter, account, sampling, wake, wakes_on_token } = submission;
        let text = sampling.text_state(self.text.as_ref())?;
        let room = self.config.max_context.saturating_sub(prompt.len() as u32);
        let params = sampling.into_params(id, room, self.seed);
        let spec = ChannelSpec {
            id,
            adapter: adapter.clone(),
            prompt: prompt.clone(),
            num_logprobs: params.logprobs,
            num_prompt_logprobs: params.prompt_logprobs,
            wake,
            wakes_on_token,
        };
        let output = Output::new(Arc::new(Channel::new(spec, text)), self.shared.inbox.clone());
        let request = NewRequest { id, adapter, prompt, params: Arc::new(params), account };
        let max_waiting = self.config.max_waiting;
        match self.shared.inbox.submit(request, output.channel.clone(), max_waiting as usize) {
            Ok(()) => Ok(output),
            Err(Refused::Full) => Err(SubmitError::QueueFull { max_waiting }.into()),
            Err(Refused::Closed) => Err(self.stopped()),
        }
    }

    /// Runs `call` on the step thread before its next step, and waits for the result.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Stepper) -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let call = Box::new(move |stepper: &mut Stepper| {
            // A caller that is gone wants no result.
            let _ = sender.send(call(stepper));
        });
        self.shared.inbox.push(Command::Call(call)).map_err(|_| self.stopped())?;
        receiver.recv().map_err(|_| self.stopped())
    }

    /// Makes the checkpoint at `path` known under `name`; its weights are read when a request wants them. With `replace`,
    /// a taken name gets a new version. `pinned`: load it now and keep it on the device. The checkpoint that is returned is the
    /// new one, also where the name means the old one until the new one is loaded.
    ///
    /// # Errors
    /// A name that cannot be one, a checkpoint that cannot be served exactly, a taken name.
    pub fn register(
        &self,
        name: &str,
        path: &Path,
        replace: bool,
        pinned: bool,
    ) -> Result<AdapterDetails, RegisterError> {
        check_name(name)?;
        self.register_adapter(name, Adapter::open(path, &self.base)?, replace, pinned)
    }

    /// [`register`](Self::register) for a path that a stranger gave: the files must lie beneath one of `roots`.
    ///
    /// # Errors
    /// As `register`, and files that lie elsewhere.
    pub fn register_beneath(
        &self,
        roots: &[PathBuf],
        name: &str,
        path: &Path,
        replace: bool,
        pinned: bool,
    ) -> Result<AdapterDetails, RegisterError> {
        check_name(name)?;
        self.register_adapter(name, Adapter::open_beneath(path, &self.base, roots)?, replace, pinned)
    }

    fn register_adapter(
        &self,
        name: &str,
        adapter: Adapter,
        replace: bool,
        pinned: bool,
    ) -> Result<AdapterDetails, RegisterError> {
        let name: Arc<str> = name.into();
        let call = move |stepper: &mut Stepper| stepper.register(name, adapter, replace, pinned);
        self.call(call).map_err(RegisterError::Stopped)?
    }

    /// The tensor accounting of a checkpoint beneath one of `roots`; nothing is registered.
    ///
    /// # Errors
    /// Why it cannot be served exactly.
    pub fn validate(&self, roots: &[PathBuf], path: &Path) -> Result<Report, slora_store::AdapterError> {
        Ok(Adapter::open_beneath(path, &self.base, roots)?.report().clone())
    }

    /// Forgets a name; unfinished requests finish first.
    ///
    /// # Errors
    /// No such name.
    pub fn unload(&self, name: &str) -> Result<(), RegisterError> {
        let name = name.to_owned();
        Ok(self.call(move |stepper| stepper.unload(&name)).map_err(RegisterError::Stopped)??)
    }

    /// Keeps an adapter on the device, or no longer.
    ///
    /// # Errors
    /// No such name.
    pub fn pin(&self, name: &str, is_pinned: bool) -> Result<(), RegisterError> {
        let name = name.to_owned();
        Ok(self.call(move |stepper| stepper.pin(&name, is_pinned)).map_err(RegisterError::Stopped)??)
    }

    fn directory(&self) -> Result<&Directory, RequestError> {
        match self.state() {
            State::Running => Ok(&self.shared.directory),
            _ => Err(self.stopped()),
        }
    }

    /// What a name means now; `None`: nothing. Never waits for the step thread.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn adapter(&self, name: &str) -> Result<Option<AdapterDetails>, RequestError> {
        Ok(self.directory()?.get(name))
    }

    /// All names, in alphabetical order. Never waits for the step thread.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn adapters(&self) -> Result<Vec<AdapterDetails>, RequestError> {
        Ok(self.directory()?.all())
    }

    /// The first `num_slabs` slabs of the host tier may be copied from. Never waits for the step thread.
    pub fn slabs_ready(&self, num_slabs: usize) {
        self.loads.slabs_ready(num_slabs);
    }

    /// Waits, on the step thread, until there may be something to plan, or the time is over. Whether the runtime is running.
    pub fn wait(&self, timeout: Duration) -> bool {
        self.shared.inbox.wait(timeout)
    }

    /// Whether steps are to be run: it is neither failed nor closing.
    pub fn is_open(&self) -> bool {
        self.shared.inbox.is_open()
    }

    /// Whether something waits for the step thread to take it, which it does between any two steps.
    pub fn has_commands(&self) -> bool {
        !self.shared.inbox.is_empty()
    }

    /// Ends every request with an error, because a step failed. Nothing is taken afterwards.
    pub fn fail(&self, reason: &str) {
        self.stop(State::Failed(reason.into()));
    }

    /// Takes nothing more and ends every request. The step thread sees it by [`wait`](Self::wait); after its last call,
    /// [`close`](Self::close) waits for the other threads.
    pub fn begin_close(&self) {
        self.stop(State::Closed);
    }

    fn stop(&self, to: State) {
        let mut state = self.shared.state();
        if *state != State::Running {
            return;
        }
        *state = to;
        drop(state);
        let error = self.stopped();
        for command in self.shared.inbox.close() {
            if let Command::Submit(_, channel) = command {
                channel.end(End::Error(error.clone()));
            }
        }
        let _ = self.messages.send(Message::EndAll(error));
    }

    /// Waits for loaders and the delivery thread: afterwards nobody touches host pages. `stepper`: the step thread's, which
    /// has ended; without it, its loaders are waited for when it is dropped.
    pub fn close(&self, stepper: Option<&mut Stepper>) {
        self.begin_close();
        if let Some(stepper) = stepper {
            stepper.close();
        }
        self.delivery.lock().unwrap_or_else(PoisonError::into_inner).close();
    }
}

fn check_name(name: &str) -> Result<(), RegisterError> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let is_name = !name.is_empty() && name.len() <= Runtime::MAX_NAME_LEN && name.bytes().all(is_allowed);
    is_name.then_some(()).ok_or_else(|| RegisterError::Name(name.to_owned()))
}
