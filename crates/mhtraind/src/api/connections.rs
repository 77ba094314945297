//! Who may be connected, how often, and for how long without a word?
//!
//! Everybody on the host can connect: what one of them can hold is bounded, so that the others are still served.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::daemon::Peer;

/// Connections of one user at the same time: more than anybody's scripts need, far fewer than a process may have open.
const OF_ONE_USER_MAX: usize = 128;

/// Connections of all users but root and whoever the daemon runs as.
const OF_ALL_MAX: usize = 512;

/// Connections of all those together who hear no more than that they are not served here.
const OF_STRANGERS_MAX: usize = 32;

/// How often it is said that somebody was sent away.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// How long a client may take to send the head of a request. One that says nothing is disconnected then.
const HEAD_WITHIN: Duration = Duration::from_secs(10);

/// How long somebody who is sent away may take to hear why, and how many may at the same time; others hear nothing.
const REFUSED_WITHIN: Duration = Duration::from_secs(5);
const REFUSALS_MAX: usize = 64;
const ASKS_WITHIN: Duration = Duration::from_secs(3);

/// How long nobody is taken in after the kernel refused a connection: it has no descriptors left.
const BREATH: Duration = Duration::from_millis(100);

/// Serves clients for ever. `serves` says whether a user is answered by more than a refusal.
pub async fn serve(listener: UnixListener, router: Router, serves: impl Fn(u32) -> bool) {
    let places = Arc::new(Places::of(rustix::process::geteuid().as_raw()));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => take_in(stream, &places, &router, &serves),
            Err(error) => {
                tracing::warn!(%error, "no connection can be taken in");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

fn take_in(stream: UnixStream, places: &Arc<Places>, router: &Router, serves: &impl Fn(u32) -> bool) {
    // Who cannot be told is nobody that we serve.
    let uid = stream.peer_cred().map_or(u32::MAX, |credentials| credentials.uid());
    let Some(place) = Place::take(places, uid, serves(uid)) else {
        if places.is_news() {
            tracing::warn!(uid, "too many connections: some are sent away");
        }
        refuse(stream, places);
        return;
    };
    let service = TowerToHyperService::new(router.clone().layer(Extension(Peer { uid })));
    tokio::spawn(async move {
        let _until_it_is_over = place;
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
        // A client that hangs up or talks nonsense is no news.
        if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
            tracing::debug!(uid, %error, "a connection has ended early");
        }
    });
}

/// Says why, to as many at a time as cost little.
fn refuse(mut stream: UnixStream, places: &Places) {
    let Ok(turn) = Arc::clone(&places.refusals).try_acquire_owned() else { return };
    tokio::spawn(async move {
        let _until_it_is_said = turn;
        let _as_far_as_it_goes = tokio::time::timeout(REFUSED_WITHIN, async {
            // An answer before the question is an error to some clients.
            let _asks_or_not = tokio::time::timeout(ASKS_WITHIN, stream.read(&mut [0; 1024])).await;
            stream.write_all(refusal().as_bytes()).await?;
            stream.shutdown().await?;
            // Who is disconnected while it still sends does not read the answer.
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
        })
        .await;
    });
}

fn refusal() -> String {
    let message =
        format!("you have {OF_ONE_USER_MAX} connections to the daemon, or all other users have {OF_ALL_MAX}");
    let body = json!({"error": {"code": "too_many_connections", "message": message, "exit_code": 1,
        "help": "close some: each `follow`, `wait` and `log -f` holds one"}});
    let body = body.to_string();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close";
    format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// How many connections each user has, and who is being sent away.
#[derive(Debug)]
struct Places {
    /// Whom the daemon runs as.
    own_uid: u32,
    taken: Mutex<BTreeMap<Whose, usize>>,
    refusals: Arc<Semaphore>,
    said_at: Mutex<Option<Instant>>,
}

/// To whom a connection counts.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Whose {
    User(u32),
    /// All who are not served together.
    Strangers,
}

impl Places {
    fn of(own_uid: u32) -> Places {
        let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
        Places { own_uid, taken: Mutex::default(), refusals, said_at: Mutex::default() }
    }

    /// Returns whether it was not said for a while that somebody was sent away.
    fn is_news(&self) -> bool {
        let mut said_at = self.said_at.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = said_at.is_none_or(|at| at.elapsed() >= SAY_EVERY);
        if is_news {
            *said_at = Some(Instant::now());
        }
        is_news
    }
}

/// The place of one connection.
#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    whose: Whose,
}

impl Place {
    /// Takes a place for a user; `None` when there is none left. Those of root and of whoever the daemon runs as are counted
    /// apart: somebody must be able to look, whatever the others do.
    fn take(places: &Arc<Places>, uid: u32, is_served: bool) -> Option<Place> {
        let whose = if is_served { Whose::User(uid) } else { Whose::Strangers };
        let is_apart = |whose: &Whose| [Whose::User(0), Whose::User(places.own_uid)].contains(whose);
        let own_max = if is_served { OF_ONE_USER_MAX } else { OF_STRANGERS_MAX };
        let mut taken = places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let others: usize = taken.iter().filter(|(whose, _)| !is_apart(whose)).map(|(_, count)| count).sum();
        let own = taken.get(&whose).copied().unwrap_or(0);
        if own >= own_max || (!is_apart(&whose) && others >= OF_ALL_MAX) {
            return None;
        }
        taken.insert(whose, own + 1);
        Some(Place { places: Arc::clone(places), whose })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let left = taken.get(&self.whose).map_or(0, |count| count - 1);
        if left == 0 {
            taken.remove(&self.whose);
        } else {
            taken.insert(self.whose, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_leaves_places_for_the_others_and_all_of_them_for_root_and_the_daemons_own() {
        let places = Arc::new(Places::of(1000));
        let take = |uid, count: usize| -> Vec<Place> {
            (0..count).filter_map(|_| Place::take(&places, uid, true)).collect()
        };
        let first = take(1, 1000);
        assert_eq!(first.len(), OF_ONE_USER_MAX);
        let others: Vec<Place> = (2..20).flat_map(|uid| take(uid, OF_ONE_USER_MAX)).collect();
        assert_eq!(first.len() + others.len(), OF_ALL_MAX);
        assert_eq!(take(0, 1000).len(), OF_ONE_USER_MAX);
        assert_eq!(take(1000, 1000).len(), OF_ONE_USER_MAX);
        drop(first);
        assert_eq!(take(20, 1).len(), 1, "a place that is left is free again");
        drop(others);
        assert!(places.taken.lock().unwrap().is_empty());
    }

    #[test]
    fn those_who_are_not_served_have_a_few_places_together() {
        let places = Arc::new(Places::of(1000));
        let strangers: Vec<Place> = (1..200).filter_map(|uid| Place::take(&places, uid, false)).collect();
        assert_eq!(strangers.len(), OF_STRANGERS_MAX);
        assert!(places.is_news() && !places.is_news());
    }
}
