//! Who calls, and what they may do.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use axum::http::{HeaderMap, StatusCode, header};
use sha2::{Digest, Sha256};
use slora_core::Account;
use subtle::{Choice, ConstantTimeEq};

use crate::admission::Tenant;
use crate::config::{Secret, ServerConfig};
use crate::errors::ApiError;
use crate::quota::{Quota, Usage};

/// SHA-256 of a key: keys themselves are not kept, and all are of one length.
pub(crate) type KeyHash = [u8; 32];

/// What a route asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Nothing.
    Open,
    /// A user's key; an admin's does too.
    User,
    /// An admin's key.
    Admin,
}

/// A user's key with what it may do.
#[derive(Debug)]
pub(crate) struct Key {
    pub hash: KeyHash,
    /// Whose it is, for logs and metrics.
    pub tenant: Arc<str>,
    /// Whose share of the machine its requests use.
    pub account: Account,
    /// Patterns of adapter names, and of the base's; `None`: all.
    pub adapters: Option<Vec<String>>,
    pub quota: Quota,
    /// What was used; outlives a new reading of the keys file.
    pub usage: Arc<Usage>,
}

/// Who calls.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub tenant: Tenant,
    /// `None`: an admin, or anybody on loopback when there are no keys.
    pub key: Option<Arc<Key>>,
}

impl Caller {
    /// Whose share of the machine the caller's requests use: that of the key's tenant, if the keys file names one.
    pub fn account(&self) -> Account {
        self.key.as_ref().map(|key| key.account.clone()).unwrap_or_default()
    }

    /// Whether this name of an adapter, or of the base, is any of the caller's business.
    pub fn may_use(&self, name: &str) -> bool {
        let patterns = self.key.as_ref().and_then(|key| key.adapters.as_ref());
        patterns.is_none_or(|patterns| patterns.iter().any(|pattern| matches_glob(pattern, name)))
    }
}

/// The keys of the file.
#[derive(Default)]
struct FileKeys {
    keys: Vec<Arc<Key>>,
    num_tenants: usize,
    max_weight: f64,
}

impl FileKeys {
    fn new(keys: Vec<Arc<Key>>) -> Self {
        let num_tenants = keys.iter().map(|key| &key.tenant).collect::<HashSet<_>>().len();
        let max_weight = keys.iter().map(|key| key.account.weight).fold(0.0, f64::max);
        Self { keys, num_tenants, max_weight }
    }
}

/// All keys.
pub(crate) struct Auth {
    admins: Vec<KeyHash>,
    users: Vec<Arc<Key>>,
    from_file: RwLock<FileKeys>,
    has_file: bool,
    open_tenant: Arc<str>,
    admin_tenant: Arc<str>,
}

impl Auth {
    pub fn new(config: &ServerConfig) -> Self {
        let user = |(index, key): (usize, &Secret)| {
            let tenant = if config.api_keys.len() == 1 { "default".into() } else { format!("key-{index}").into() };
            let (quota, usage) = (Quota::default(), Arc::default());
            let account = Account::default();
            Arc::new(Key { hash: hash(&key.0), tenant, account, adapters: None, quota, usage })
        };
        Self {
            admins: config.admin_keys.iter().map(|key| hash(&key.0)).collect(),
            users: config.api_keys.iter().enumerate().map(user).collect(),
            from_file: RwLock::default(),
            has_file: config.api_keys_file.is_some(),
            open_tenant: "anonymous".into(),
            admin_tenant: "admin".into(),
        }
    }

    /// Whether any key is asked for.
    pub fn has_keys(&self) -> bool {
        self.has_file || !self.users.is_empty() || !self.admins.is_empty()
    }

    /// The keys of the file, as it is now.
    pub fn set_file_keys(&self, keys: Vec<Key>) {
        let mut current = self.from_file.write().unwrap_or_else(PoisonError::into_inner);
        let used: HashMap<KeyHash, &Arc<Usage>> = current.keys.iter().map(|key| (key.hash, &key.usage)).collect();
        let carried = keys.into_iter().map(|mut key| {
            if let Some(usage) = used.get(&key.hash) {
                key.usage = Arc::clone(usage);
            }
            Arc::new(key)
        });
        *current = FileKeys::new(carried.collect());
    }

    /// Lets a caller in, or says why not.
    pub fn admit(&self, level: Level, headers: &HeaderMap, peer: IpAddr) -> Result<Caller, ApiError> {
        let open = Caller { tenant: Tenant { name: self.open_tenant.clone(), share: None }, key: None };
        if level == Level::Open {
            return Ok(open);
        }
        if !self.has_keys() {
            return self.admit_keyless(level, headers, peer).map(|()| open);
        }
        let Some(token) = bearer(headers) else {
            return Err(unauthorized("no API key: send it as `Authorization: Bearer KEY`"));
        };
        let given = hash(token);
        // Every key is compared with, whatever the outcome of the others.
        let is_admin = self.admins.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(&given));
        let file = self.from_file.read().unwrap_or_else(PoisonError::into_inner);
        if bool::from(is_admin) {
            return Ok(Caller { tenant: self.tenant(&file, &self.admin_tenant, 1.0), key: None });
        }
        let mut found = None;
        for key in self.users.iter().chain(&file.keys) {
            if bool::from(key.hash.ct_eq(&given)) {
                found = Some(key.clone());
            }
        }
        match (found, level) {
            (None, _) => Err(unauthorized("the API key is not a valid one")),
            (Some(_), Level::Admin) => Err(forbidden("adapters are managed with an admin key")),
            (Some(key), _) => {
                Ok(Caller { tenant: self.tenant(&file, &key.tenant, key.account.weight), key: Some(key) })
            }
        }
    }

    /// Each key of the command line is a tenant too, of weight 1. An admin's key is not counted: it is rarely there to ask.
    fn tenant(&self, file: &FileKeys, name: &Arc<str>, weight: f64) -> Tenant {
        let max_weight = if self.users.is_empty() { file.max_weight } else { file.max_weight.max(1.0) };
        let is_shared = self.users.len() + file.num_tenants > 1;
        Tenant { name: name.clone(), share: is_shared.then(|| (weight / max_weight).min(1.0)) }
    }

    /// Without any key: inference on loopback only, no management. A name in `Host` that is not loopback's is a browser
    /// that was led here by a page of somebody else.
    fn admit_keyless(&self, level: Level, headers: &HeaderMap, peer: IpAddr) -> Result<(), ApiError> {
        if level == Level::Admin {
            return Err(forbidden("adapters are managed with an admin key; hint: start the server with --admin-key"));
        }
        if is_loopback(peer) && host_is_loopback(headers) {
            return Ok(());
        }
        Err(unauthorized("the server has no keys and so answers on loopback only; hint: start it with --api-key"))
    }
}

fn is_loopback(peer: IpAddr) -> bool {
    peer.to_canonical().is_loopback()
}

fn host_is_loopback(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(is_loopback)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty()).then_some(token.trim())
}

fn unauthorized(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
}

fn forbidden(message: &str) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, "permission_denied", message)
}

pub(crate) fn hash(key: &str) -> KeyHash {
    Sha256::digest(key.as_bytes()).into()
}

/// `*`: any characters, `?`: one. Linear in both.
pub(crate) fn matches_glob(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((after, at)) = star else { return false };
                star = Some((after, at + 1));
                (p, n) = (after, at + 1);
            }
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| (name.parse().unwrap(), value.parse().unwrap());
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn globs_match_as_shells_do() {
        let matching =
            [("*", "x"), ("*", ""), ("sql-*", "sql-"), ("sql-*", "sql-a.b"), ("a?c", "abc"), ("*-x-*", "1-x-x-2")];
        assert!(matching.iter().all(|(pattern, name)| matches_glob(pattern, name)));
        let other = [("", "x"), ("sql-*", "sql"), ("a?c", "ac"), ("*b", "abc"), ("abc", "ABC")];
        assert!(!other.iter().any(|(pattern, name)| matches_glob(pattern, name)));
        assert!(!matches_glob(&"*a".repeat(64), &"a".repeat(63)));
    }

    #[test]
    fn without_keys_only_loopback_may_ask_and_nobody_manages() {
        let auth = Auth::new(&ServerConfig::default());
        let here = "127.0.0.1".parse().unwrap();
        assert!(auth.admit(Level::User, &headers(&[("host", "localhost:8000")]), here).is_ok());
        assert!(auth.admit(Level::User, &headers(&[("host", "[::1]:8000")]), "::1".parse().unwrap()).is_ok());
        let rebound = auth.admit(Level::User, &headers(&[("host", "evil.example:8000")]), here);
        assert_eq!(rebound.unwrap_err().status.as_u16(), 401);
        assert_eq!(
            auth.admit(Level::User, &headers(&[]), "10.0.0.1".parse().unwrap()).unwrap_err().status.as_u16(),
            401
        );
        assert_eq!(auth.admit(Level::Admin, &headers(&[]), here).unwrap_err().status.as_u16(), 403);
    }

    #[test]
    fn shares_are_by_the_greatest_weight_and_nobody_shares_alone() {
        let config = |num_keys: usize| ServerConfig {
            api_keys: (0..num_keys).map(|index| Secret(format!("flag-{index}"))).collect(),
            admin_keys: vec![Secret("admin".into())],
            api_keys_file: Some("keys.json".into()),
            ..ServerConfig::default()
        };
        let key = |name: &str, tenant: &str, weight: f64| Key {
            hash: hash(name),
            tenant: tenant.into(),
            account: Account { tenant: Some(tenant.into()), weight, priority: 0 },
            adapters: None,
            quota: Quota::default(),
            usage: Arc::default(),
        };
        let share = |auth: &Auth, name: &str| {
            let headers = headers(&[("authorization", &format!("Bearer {name}"))]);
            auth.admit(Level::User, &headers, "10.0.0.1".parse().unwrap()).unwrap().tenant.share
        };
        let auth = Auth::new(&config(0));
        auth.set_file_keys(vec![key("a", "one", 4.0), key("b", "one", 4.0)]);
        assert_eq!([share(&auth, "a"), share(&auth, "b"), share(&auth, "admin")], [None; 3]);
        auth.set_file_keys(vec![key("a", "one", 4.0), key("b", "one", 4.0), key("c", "other", 0.5)]);
        assert_eq!(["a", "b", "c", "admin"].map(|name| share(&auth, name)), [1.0, 1.0, 0.125, 0.25].map(Some));
        let auth = Auth::new(&config(1));
        assert_eq!(share(&auth, "flag-0"), None);
        auth.set_file_keys(vec![key("c", "other", 0.5)]);
        assert_eq!(["flag-0", "c"].map(|name| share(&auth, name)), [1.0, 0.5].map(Some));
        assert_eq!(share(&Auth::new(&config(2)), "flag-1"), Some(1.0));
    }

    #[test]
    fn what_keys_have_used_outlives_a_new_reading_of_however_many() {
        let auth = Auth::new(&ServerConfig { api_keys_file: Some("keys.json".into()), ..ServerConfig::default() });
        let read = || {
            let key = |index: u32| Key {
                hash: hash(&index.to_string()),
                tenant: "all".into(),
                account: Account::default(),
                adapters: None,
                quota: Quota { concurrency: Some(1), ..Quota::default() },
                usage: Arc::default(),
            };
            (0..60_000).map(key).collect()
        };
        auth.set_file_keys(read());
        let headers = headers(&[("authorization", "Bearer 59999")]);
        let key = || auth.admit(Level::User, &headers, "10.0.0.1".parse().unwrap()).unwrap().key.unwrap();
        let enter = || key().usage.enter(&key().quota, 1, Instant::now());
        let place = enter().unwrap();
        let (keys, begun) = (read(), Instant::now());
        auth.set_file_keys(keys);
        let took = begun.elapsed();
        assert!(enter().is_err());
        drop(place);
        assert!(enter().is_ok());
        assert!(took < Duration::from_secs(1), "nobody was let in for {took:?}");
    }

    #[test]
    fn a_users_key_is_forbidden_and_a_wrong_one_unauthorized_where_admins_go() {
        let config = ServerConfig {
            api_keys: vec![Secret("user".into())],
            admin_keys: vec![Secret("admin".into())],
            ..ServerConfig::default()
        };
        let auth = Auth::new(&config);
        let peer = "10.0.0.1".parse().unwrap();
        let status = |key: &str| {
            let headers = headers(&[("authorization", &format!("Bearer {key}"))]);
            auth.admit(Level::Admin, &headers, peer).map_or_else(|error| error.status.as_u16(), |_| 200)
        };
        assert_eq!([status("user"), status("wrong"), status("admin")], [403, 401, 200]);
    }
}
