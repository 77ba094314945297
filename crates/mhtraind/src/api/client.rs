//! How does a command reach the daemon?

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::config::Config;
use crate::failure::{Failure, Status};

/// A connection's worth of questions to one daemon.
#[derive(Debug)]
pub struct Client {
    /// Where a daemon may be; the first that is there is asked.
    sockets: Vec<PathBuf>,
    runtime: Runtime,
}

/// Whether a stream is read on.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ReadOn {
    /// It is.
    Yes,
    /// Enough was read.
    No,
}

impl Client {
    /// Returns a client of the daemon that the settings name.
    ///
    /// # Errors
    /// The system gives us no event loop.
    pub fn new(config: &Config) -> Result<Client, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Failure::new(Status::Bug, "no_runtime", e))?;
        Ok(Client { sockets: config.sockets(), runtime })
    }

    /// Asks for something and returns the answer.
    ///
    /// # Errors
    /// No daemon is there, or what it says.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.ask(Method::GET, path, Vec::new())
    }

    /// Sends something and returns the answer.
    ///
    /// # Errors
    /// No daemon is there, or what it says.
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        let body = serde_json::to_vec(body).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
        self.ask(Method::POST, path, body)
    }

    /// Removes something.
    ///
    /// # Errors
    /// No daemon is there, or what it says.
    pub fn delete(&self, path: &str) -> Result<(), Failure> {
        self.runtime.block_on(async { self.respond(Method::DELETE, path, Vec::new()).await.map(drop) })
    }

    /// Reads a stream, chunk by chunk as they come.
    ///
    /// # Errors
    /// No daemon is there, what it says, the daemon ended in the middle, or what `take` says.
    pub fn stream(
        &self,
        path: &str,
        mut take: impl FnMut(&[u8]) -> Result<ReadOn, Failure>,
    ) -> Result<(), Failure> {
        self.stream_for(path, None, &mut take)
    }

    /// Reads a stream until it ends or the time is up, whichever comes first.
    ///
    /// # Errors
    /// As [`Client::stream`].
    pub fn stream_for(
        &self,
        path: &str,
        limit: Option<Duration>,
        mut take: impl FnMut(&[u8]) -> Result<ReadOn, Failure>,
    ) -> Result<(), Failure> {
        let read = self.read(path, &mut take);
        self.runtime.block_on(async {
            match limit {
                None => read.await,
                Some(limit) => tokio::time::timeout(limit, read).await.unwrap_or(Ok(())),
            }
        })
    }

    async fn read(
        &self,
        path: &str,
        take: &mut impl FnMut(&[u8]) -> Result<ReadOn, Failure>,
    ) -> Result<(), Failure> {
        let mut response = self.respond(Method::GET, path, Vec::new()).await?;
        while let Some(frame) = response.body_mut().frame().await {
            let frame = frame.map_err(lost)?;
            if let Some(data) = frame.data_ref()
                && take(data)? == ReadOn::No
            {
                return Ok(());
            }
        }
        Ok(())
    }

    fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>) -> Result<T, Failure> {
        self.runtime.block_on(async {
            let response = self.respond(method, path, body).await?;
            let bytes = response.into_body().collect().await.map_err(lost)?.to_bytes();
            serde_json::from_slice(&bytes).map_err(|e| {
                Failure::new(
                    Status::Bug,
                    "bad_answer",
                    format!("the daemon's answer cannot be understood: {e}"),
                )
                .help("are the daemon and this command of the same version?".to_owned())
            })
        })
    }

    /// Returns a good answer; a bad one as the failure that it holds.
    async fn respond(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = connect(&self.sockets).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "mhtraind")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| Failure::new(Status::Bug, "bad_request", e))?;
        let response = sender.send_request(request).await.map_err(lost)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(lost)?.to_bytes();
        let failure = serde_json::from_slice(&bytes).ok().as_ref().and_then(Failure::from_json);
        Err(failure.unwrap_or_else(|| {
            let text = String::from_utf8_lossy(&bytes);
            Failure::bad_input("refused", format!("the daemon answers {status}: {}", text.trim()))
        }))
    }
}

/// Connects to the first of the sockets that is there and listened to.
async fn connect(sockets: &[PathBuf]) -> Result<UnixStream, Failure> {
    let mut refusals = Vec::new();
    for socket in sockets {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                let is_there = !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
                refusals.push((socket.as_path(), error));
                if is_there {
                    break;
                }
            }
        }
    }
    Err(no_daemon(&refusals))
}

fn lost(error: hyper::Error) -> Failure {
    Failure::new(Status::NoDaemon, "daemon_lost", format!("the daemon hung up: {error}"))
        .help("running trainers go on; ask again when the daemon is back".to_owned())
}

fn no_daemon(refusals: &[(&Path, std::io::Error)]) -> Failure {
    let (status, help) = match refusals.last().map(|(_, error)| error.kind()) {
        Some(ErrorKind::PermissionDenied) => (Status::NotPermitted, "its directory is closed to this user"),
        _ => (
            Status::NoDaemon,
            "start one: `mhtraind serve`, or `systemctl start mhtraind`; --socket names another; `mhtraind run job.json` needs none",
        ),
    };
    let places = refusals.iter().map(|(socket, error)| format!("at {}: {error}", socket.display()));
    let what = format!("no daemon can be reached {}", places.collect::<Vec<_>>().join(", nor "));
    Failure::new(status, "no_daemon", what).help(help.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_users_own_daemon_is_asked_before_the_hosts() {
        let directory = tempfile::tempdir().unwrap();
        let sockets = ["own", "host"].map(|name| directory.path().join(name));
        let none = connect(&sockets).await.unwrap_err();
        assert_eq!(none.status, Status::NoDaemon);
        assert!(none.message.contains("/own: ") && none.message.contains("nor at"), "{}", none.message);
        let host = tokio::net::UnixListener::bind(&sockets[1]).unwrap();
        connect(&sockets).await.unwrap();
        host.accept().await.unwrap();
        // One that a dead daemon left.
        drop(tokio::net::UnixListener::bind(&sockets[0]).unwrap());
        connect(&sockets).await.unwrap();
        host.accept().await.unwrap();
        std::fs::remove_file(&sockets[0]).unwrap();
        let own = tokio::net::UnixListener::bind(&sockets[0]).unwrap();
        connect(&sockets).await.unwrap();
        own.accept().await.unwrap();
    }
}
