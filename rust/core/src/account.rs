//! Whose share of the machine a request uses.

use std::sync::Arc;

/// Whose share of the machine a request uses, how large that share is, and before whom the request runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Account {
    /// Whose; `None`: its adapter's, or the base's.
    pub tenant: Option<Arc<str>>,
    /// Of two accounts with requests waiting all the time, one of twice the weight gets twice the tokens. Says nothing if
    /// requests are [served in the order of their arrival](crate::QueueOrder::Fcfs).
    pub weight: f64,
    /// Requests of a higher one are admitted first, and give way last.
    pub priority: i32,
}

/// What cannot be an account.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AccountError {
    /// The weight is no number, or out of range.
    #[error("weight is {0}, it must be {min} to {max}", min = Account::MIN_WEIGHT, max = Account::MAX_WEIGHT)]
    Weight(f64),
    /// The priority is out of range.
    #[error("priority is {0}, it must be -{limit} to {limit}", limit = Account::MAX_PRIORITY)]
    Priority(i32),
}

impl Account {
    /// Least weight.
    pub const MIN_WEIGHT: f64 = 0.01;
    /// Greatest weight.
    pub const MAX_WEIGHT: f64 = 100.0;
    /// Greatest priority; the least one is as far below 0.
    pub const MAX_PRIORITY: i32 = 100;

    /// Refuses weights and priorities that are out of range.
    ///
    /// # Errors
    /// The first of them.
    pub fn check(&self) -> Result<(), AccountError> {
        if !(Self::MIN_WEIGHT..=Self::MAX_WEIGHT).contains(&self.weight) {
            return Err(AccountError::Weight(self.weight));
        }
        if self.priority.unsigned_abs() > Self::MAX_PRIORITY as u32 {
            return Err(AccountError::Priority(self.priority));
        }
        Ok(())
    }
}

impl Default for Account {
    fn default() -> Self {
        Self { tenant: None, weight: 1.0, priority: 0 }
    }
}

/// Whose requests stand in one line.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Holder {
    /// First come, first served: nobody is told apart.
    Everyone,
    Base,
    Adapter(Arc<str>),
    Tenant(Arc<str>),
}

impl Holder {
    /// Of a request for this adapter, or for the base.
    pub fn of(account: &Account, adapter: Option<&Arc<str>>) -> Self {
        match (&account.tenant, adapter) {
            (Some(tenant), _) => Self::Tenant(tenant.clone()),
            (None, Some(name)) => Self::Adapter(name.clone()),
            (None, None) => Self::Base,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_priorities_have_limits() {
        let check = |weight, priority| Account { weight, priority, ..Account::default() }.check();
        for (weight, priority) in [(0.01, -100), (1.0, 0), (100.0, 100)] {
            assert_eq!(check(weight, priority), Ok(()));
        }
        for weight in [0.0, 0.0099, 100.1, -1.0, f64::INFINITY] {
            assert_eq!(check(weight, 0), Err(AccountError::Weight(weight)));
        }
        assert!(matches!(check(f64::NAN, 0), Err(AccountError::Weight(_))));
        for priority in [-101, 101, i32::MIN, i32::MAX] {
            assert_eq!(check(1.0, priority), Err(AccountError::Priority(priority)));
        }
        assert_eq!(AccountError::Priority(101).to_string(), "priority is 101, it must be -100 to 100");
    }
}
