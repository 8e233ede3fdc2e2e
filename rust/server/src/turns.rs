//! Places that tenants take in turn: whoever sends much waits for its own work, not others for all of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A few places, and the line before them. A tenant stands in it at most as often as there are places; what else it wants
/// waits in a line of its own.
pub(crate) struct Turns {
    num_places: usize,
    places: Arc<Semaphore>,
    /// Of those who have something here.
    tenants: Mutex<HashMap<Arc<str>, Weak<Semaphore>>>,
}

/// A place; given back when dropped.
pub(crate) struct Turn {
    _place: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
}

impl Turns {
    pub fn new(num_places: usize) -> Self {
        let places = Arc::new(Semaphore::new(num_places));
        Self { num_places, places, tenants: Mutex::default() }
    }

    /// Waits for a place. Whoever leaves while waiting was never there.
    pub async fn take(&self, tenant: &Arc<str>) -> Turn {
        let own = acquire(self.line(tenant)).await;
        Turn { _place: acquire(self.places.clone()).await, _own: own }
    }

    fn line(&self, tenant: &Arc<str>) -> Arc<Semaphore> {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = tenants.get(tenant).and_then(Weak::upgrade) {
            return line;
        }
        tenants.retain(|_, line| line.strong_count() > 0);
        let line = Arc::new(Semaphore::new(self.num_places));
        tenants.insert(tenant.clone(), Arc::downgrade(&line));
        line
    }
}

async fn acquire(semaphore: Arc<Semaphore>) -> OwnedSemaphorePermit {
    let Ok(permit) = semaphore.acquire_owned().await else { unreachable!("nobody closes it") };
    permit
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_tenant_with_much_to_do_holds_others_up_for_one_turn() {
        let turns = Arc::new(Turns::new(2));
        let [many, one]: [Arc<str>; 2] = ["many".into(), "one".into()];
        let order = Arc::new(Mutex::new(Vec::new()));
        let ask = |tenant: &Arc<str>| {
            let (turns, order, tenant) = (turns.clone(), order.clone(), tenant.clone());
            tokio::spawn(async move {
                let _turn = turns.take(&tenant).await;
                order.lock().unwrap().push(tenant);
                tokio::time::sleep(Duration::from_millis(2)).await;
            })
        };
        let mut tasks: Vec<_> = (0..50).map(|_| ask(&many)).collect();
        // The last one is cancelled in the line.
        tokio::task::yield_now().await;
        tasks.pop().unwrap().abort();
        tasks.push(ask(&one));
        for task in tasks {
            task.await.unwrap();
        }
        let order = std::mem::take(&mut *order.lock().unwrap());
        let place = order.iter().position(|tenant| *tenant == one).unwrap();
        assert!(order.len() == 50 && place <= 4, "{place} of {}", order.len());
        assert_eq!(turns.places.available_permits(), 2);
        drop(turns.take(&one).await);
        assert_eq!(turns.tenants.lock().unwrap().len(), 1, "those who left are forgotten");
    }
}
