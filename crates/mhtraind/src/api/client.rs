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
    socket: PathBuf,
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
        Ok(Client { socket: config.socket(), runtime })
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
            let frame = frame.map_err(|e| self.lost(&e))?;
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
            let bytes = response.into_body().collect().await.map_err(|e| self.lost(&e))?.to_bytes();
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
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| no_daemon(&self.socket, &e))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.lost(&e))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "mhtraind")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| Failure::new(Status::Bug, "bad_request", e))?;
        let response = sender.send_request(request).await.map_err(|e| self.lost(&e))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(|e| self.lost(&e))?.to_bytes();
        let failure = serde_json::from_slice(&bytes).ok().as_ref().and_then(Failure::from_json);
        Err(failure.unwrap_or_else(|| {
            let text = String::from_utf8_lossy(&bytes);
            Failure::bad_input("refused", format!("the daemon answers {status}: {}", text.trim()))
        }))
    }

    fn lost(&self, error: &hyper::Error) -> Failure {
        Failure::new(
            Status::NoDaemon,
            "daemon_lost",
            format!("the daemon at {} hung up: {error}", self.socket.display()),
        )
        .help("running trainers go on; ask again when the daemon is back".to_owned())
    }
}

fn no_daemon(socket: &Path, error: &std::io::Error) -> Failure {
    let (status, help) = match error.kind() {
        ErrorKind::PermissionDenied => (Status::NotPermitted, "its directory is closed to this user"),
        _ => (
            Status::NoDaemon,
            "start one: `mhtraind serve`, or `systemctl start mhtraind`; --socket names another; `mhtraind run job.json` needs none",
        ),
    };
    Failure::new(status, "no_daemon", format!("no daemon can be reached at {}: {error}", socket.display()))
        .help(help.to_owned())
}
