//! Every version of every adapter, and where its weights are.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::adapter::{AdapterId, AdapterInfo, AdapterSpec, AdapterState, LoadFailure};
use crate::queue::Turn;

/// An image in the host tier.
#[derive(Debug, Default)]
pub(crate) enum HostImage {
    #[default]
    None,
    /// The pages belong to the loader.
    Loading(Arc<[u32]>),
    Ready(Arc<[u32]>),
}

/// An image on the device.
#[derive(Debug, Default)]
pub(crate) enum DeviceImage {
    #[default]
    None,
    /// A copy of this step is in flight: it pins the host pages and these. An adapter copied *outside* the step is not used
    /// before the copy has arrived.
    Copying {
        pages: Arc<[u32]>,
        step: u32,
        is_outside: bool,
    },
    Ready(Arc<[u32]>),
}

impl DeviceImage {
    pub fn pages(&self) -> Option<&Arc<[u32]>> {
        match self {
            Self::None => None,
            Self::Copying { pages, .. } | Self::Ready(pages) => Some(pages),
        }
    }
}

/// One version of an adapter.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub name: Arc<str>,
    pub version: u32,
    pub generation: u32,
    pub spec: AdapterSpec,
    pub host: HostImage,
    pub device: DeviceImage,
    /// Running requests that use it.
    pub pins: u32,
    /// Unfinished requests bound to it.
    pub unfinished: u32,
    /// Those of them that wait, in the queue's order.
    pub waiting: BTreeMap<Turn, u32>,
    /// Whether `waiting` is in the ready queue.
    pub is_ready: bool,
    /// Its entry in the order of loads.
    pub load_key: Option<Turn>,
    /// Its entry in the operator's wishes.
    pub wish_key: Option<u64>,
    /// It will be what its name means once it is loaded.
    pub is_next: bool,
    /// The operator keeps it on the device.
    pub is_pinned: bool,
    /// No longer what its name means; goes away with its last request.
    pub is_retired: bool,
    /// The loader was asked to stop.
    pub is_load_cancelled: bool,
    /// Its name is among those that changed.
    is_changed: bool,
    pub failure: Option<LoadFailure>,
    pub descriptor_row: Option<u32>,
    /// Recent use: a count that halves every [`HALF_LIFE_US`].
    use_count: f64,
    count_time_us: u64,
    use_time_us: u64,
}

/// Half-life of an adapter's use count, in microseconds.
const HALF_LIFE_US: f64 = 60e6;
const BURST_US: u64 = 2_000_000;

impl Adapter {
    /// Whether requests that use it may be admitted: its weights can be on the device when the step reads them.
    pub fn can_run(&self) -> bool {
        match &self.device {
            DeviceImage::Ready(_) => true,
            DeviceImage::Copying { is_outside, .. } => !is_outside,
            DeviceImage::None => matches!(self.host, HostImage::Ready(_)),
        }
    }

    pub fn is_resident(&self) -> bool {
        self.device.pages().is_some()
    }

    /// Whether device pages may be taken from it.
    pub fn is_evictable(&self) -> bool {
        self.pins == 0 && !self.is_pinned && matches!(self.device, DeviceImage::Ready(_))
    }

    /// Whether it could be loaded, and nothing was ordered yet.
    pub fn can_load(&self) -> bool {
        matches!(self.host, HostImage::None) && !self.is_resident() && self.failure.is_none()
    }

    /// The first request that waits for a load that was not ordered yet.
    pub fn wants_load(&self) -> Option<Turn> {
        self.waiting.keys().next().copied().filter(|_| self.can_load())
    }

    /// Whether the operator waits for a load that was not ordered yet.
    pub fn is_wished(&self) -> bool {
        (self.is_pinned || self.is_next) && self.can_load()
    }

    /// Whether it should be brought to the device for the operator.
    pub fn is_absent_pin(&self) -> bool {
        self.is_pinned && !self.is_resident() && matches!(self.host, HostImage::Ready(_))
    }

    /// The first request that wants it; the operator's wish counts as behind all of them.
    pub fn wanted_by(&self) -> Option<Turn> {
        self.waiting.keys().next().copied().or(self.is_pinned.then_some(Turn::LAST))
    }

    /// A retired version without a host image could not be loaded again if its files have changed.
    pub fn can_come_back(&self) -> bool {
        !self.is_retired || self.unfinished == 0 || matches!(self.host, HostImage::Ready(_))
    }

    pub fn state(&self) -> AdapterState {
        match (&self.device, &self.host) {
            _ if self.failure.is_some() => AdapterState::Failed,
            (DeviceImage::Ready(_) | DeviceImage::Copying { .. }, _) => AdapterState::Resident,
            (_, HostImage::Ready(_)) => AdapterState::Host,
            (_, HostImage::Loading(_)) => AdapterState::Loading,
            _ => AdapterState::Registered,
        }
    }

    /// Uses that follow each other within [`BURST_US`] count as one: they say nothing of how soon the next one comes.
    pub fn record_use(&mut self, now_us: u64) {
        let since_counted = now_us.saturating_sub(self.count_time_us);
        if self.use_count == 0.0 || since_counted >= BURST_US {
            self.use_count = self.use_count * (-(since_counted as f64) / HALF_LIFE_US).exp2() + 1.0;
            self.count_time_us = now_us;
        }
        self.use_time_us = now_us;
    }

    pub fn recent_use(&self, now_us: u64) -> f64 {
        let age = now_us.saturating_sub(self.use_time_us) as f64;
        self.use_count * (-age / HALF_LIFE_US).exp2()
    }
}

/// What a name means: its current version, and the one that will replace it once it is loaded.
#[derive(Debug)]
pub(crate) struct Name {
    pub current: u32,
    pub next: Option<u32>,
    pub versions: u32,
    /// Why the last replacement failed.
    pub replace_failure: Option<LoadFailure>,
}

/// All versions, by place.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    places: Vec<Option<Adapter>>,
    generations: Vec<u32>,
    vacant: Vec<u32>,
    /// Versions that were written to since somebody asked, with their names.
    changed: Vec<(u32, Arc<str>)>,
    pub names: HashMap<Arc<str>, Name>,
}

impl Registry {
    pub fn get(&self, index: u32) -> &Adapter {
        match &self.places[index as usize] {
            Some(adapter) => adapter,
            None => unreachable!("a bound adapter is registered"),
        }
    }

    /// Every change of a version, or of what a name means, comes through here or through [`insert`](Self::insert).
    pub fn get_mut(&mut self, index: u32) -> &mut Adapter {
        match &mut self.places[index as usize] {
            Some(adapter) => {
                if !std::mem::replace(&mut adapter.is_changed, true) {
                    self.changed.push((index, adapter.name.clone()));
                }
                adapter
            }
            None => unreachable!("a bound adapter is registered"),
        }
    }

    /// A name that may have changed since it was returned last.
    pub fn next_changed(&mut self) -> Option<Arc<str>> {
        let (index, name) = self.changed.pop()?;
        if let Some(adapter) = &mut self.places[index as usize] {
            adapter.is_changed = false;
        }
        Some(name)
    }

    /// The place of `id`, if that version still exists.
    pub fn find(&self, id: AdapterId) -> Option<u32> {
        let adapter = self.places.get(id.index as usize)?.as_ref()?;
        (adapter.generation == id.generation).then_some(id.index)
    }

    pub fn id(&self, index: u32) -> AdapterId {
        AdapterId { index, generation: self.get(index).generation }
    }

    pub fn insert(&mut self, name: Arc<str>, version: u32, spec: AdapterSpec) -> u32 {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.generations.push(0);
            self.places.len() as u32 - 1
        });
        self.generations[index as usize] += 1;
        self.changed.push((index, name.clone()));
        self.places[index as usize] = Some(Adapter {
            name,
            version,
            generation: self.generations[index as usize],
            spec,
            host: HostImage::None,
            device: DeviceImage::None,
            pins: 0,
            unfinished: 0,
            waiting: BTreeMap::new(),
            is_ready: false,
            load_key: None,
            wish_key: None,
            is_next: false,
            is_pinned: false,
            is_retired: false,
            is_load_cancelled: false,
            is_changed: true,
            failure: None,
            descriptor_row: None,
            use_count: 0.0,
            count_time_us: 0,
            use_time_us: 0,
        });
        index
    }

    pub fn remove(&mut self, index: u32) {
        self.places[index as usize] = None;
        self.vacant.push(index);
    }

    pub fn len(&self) -> usize {
        self.places.len() - self.vacant.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Adapter)> {
        self.places.iter().enumerate().filter_map(|(index, place)| Some((index as u32, place.as_ref()?)))
    }

    pub fn info(&self, name: &str) -> Option<AdapterInfo> {
        let entry = self.names.get(name)?;
        let adapter = self.get(entry.current);
        Some(AdapterInfo {
            id: self.id(entry.current),
            name: adapter.name.clone(),
            version: adapter.version,
            state: adapter.state(),
            failure: adapter.failure.clone().or_else(|| entry.replace_failure.clone()),
            num_pages: adapter.spec.num_pages,
            bytes: adapter.spec.bytes,
            pins: adapter.pins,
            unfinished: adapter.unfinished,
            pinned: adapter.is_pinned,
            replacing: entry.next.is_some(),
        })
    }
}
