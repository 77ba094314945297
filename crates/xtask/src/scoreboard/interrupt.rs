//! Was Ctrl-C pressed?

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

/// Whether SIGINT or SIGTERM came. Until then nothing ends by it: what runs is ended first.
#[derive(Clone, Debug)]
pub(super) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Begins to listen, for the rest of the process.
    pub(super) fn listen() -> anyhow::Result<Interrupt> {
        let asked = Arc::new(AtomicBool::new(false));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut ctrl_c, mut term) = {
            let _inside = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let flag = Arc::clone(&asked);
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = ctrl_c.recv() => {}, _ = term.recv() => {} }
            });
            flag.store(true, Ordering::SeqCst);
        });
        Ok(Interrupt(asked))
    }

    pub(super) fn asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
