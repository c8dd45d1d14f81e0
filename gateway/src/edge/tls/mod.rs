//! TLS of the listeners: certificates, their reload without closing connections, and the devices that client
//! certificates name. Start with [`Endpoint`].
//!
//! rustls with ring, TLS 1.2 and 1.3, and tickets of rustls only. A session keeps the certificate that it began with;
//! new connections use new files. Files that cannot be used change nothing except the log, a metric, `/readyz` and an
//! alarm.

mod certified;
mod files;
mod inspect;
mod revocation;

use std::{
    collections::HashSet,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::{
    ServerConfig,
    crypto::ring,
    server::{ProducesTickets, ServerConnection},
};
use seawall_proto::{hello::Certified, id::CertificateTag, time::WallTime};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};

pub use self::{
    files::{ClientFiles, Files, Loaded, Stamps, TlsError, provider},
    inspect::{Note, inspect},
};
use crate::{
    edge::{bounded::Bounded, transport::Transport},
    runtime::config::Config,
};

/// Number of passes over the sessions for the certificates that new lists revoke: one at once, and two more for
/// handshakes that were running then. The number is bounded: the tags have 31 bits, and a device whose tag collides
/// with a revoked one must get its session back.
pub const REVOKED_PASSES: u8 = 3;

/// Remaining validity of a certificate below which operators are notified.
pub const EXPIRY_NOTICE: Duration = Duration::from_hours(14 * 24);

/// Maximum data that rustls buffers for a client that does not read, in bytes: one of its records.
const BUFFER_LEN_MAX: usize = 16 * 1024;

/// The first byte of every TLS connection: the type of a handshake record (RFC 8446 §5.1).
const HANDSHAKE_RECORD: u8 = 0x16;

/// TLS of the listeners; `None` for plain TCP.
#[derive(Default)]
pub struct Tls {
    pub devices: Option<Endpoint>,
    pub ops: Option<Endpoint>,
}

impl Tls {
    /// # Errors
    /// A file cannot be read or used.
    pub fn open(config: &Config) -> Result<Self, TlsError> {
        Ok(Self {
            devices: Files::of_devices(config).map(Endpoint::open).transpose()?,
            ops: Files::of_ops(config).map(Endpoint::open).transpose()?,
        })
    }

    /// The endpoints, with the name of their listener.
    pub fn endpoints(&self) -> impl Iterator<Item = (&'static str, &Endpoint)> {
        [("devices", &self.devices), ("ops", &self.ops)]
            .into_iter()
            .filter_map(|(listener, endpoint)| Some((listener, endpoint.as_ref()?)))
    }

    /// Why the files of a listener were rejected at the last reload, if they were.
    #[must_use]
    pub fn problem(&self) -> Option<Arc<String>> {
        self.endpoints().find_map(|(_, endpoint)| endpoint.problem())
    }

    /// Expiry of the first certificate to expire.
    #[must_use]
    pub fn expires(&self) -> Option<WallTime> {
        self.endpoints().map(|(_, endpoint)| endpoint.expires()).min()
    }

    /// Certificates of devices that the latest lists name and the previous ones did not. `None` if there are none, or
    /// if [`REVOKED_PASSES`] passes are done.
    #[must_use]
    pub fn take_newly_revoked(&self) -> Option<Arc<HashSet<CertificateTag>>> {
        self.devices.as_ref()?.newly_revoked().take()
    }

    /// Time at which the first revocation list should be replaced; `None` if no list has one.
    #[must_use]
    pub fn lists_until(&self) -> Option<WallTime> {
        self.endpoints()
            .filter_map(|(_, endpoint)| endpoint.current.load().lists_until)
            .min()
    }
}

/// Certificates that were revoked by the latest change of the lists.
#[derive(Default)]
struct NewlyRevoked {
    certificates: Arc<HashSet<CertificateTag>>,
    passes_left: u8,
}

impl NewlyRevoked {
    fn add(&mut self, revoked: impl Iterator<Item = CertificateTag>) {
        let earlier = (self.passes_left > 0).then(|| Arc::clone(&self.certificates));
        let earlier = earlier.iter().flat_map(|earlier| earlier.iter().copied());
        self.certificates = Arc::new(revoked.chain(earlier).collect());
        self.passes_left = if self.certificates.is_empty() {
            0
        } else {
            REVOKED_PASSES
        };
    }

    fn take(&mut self) -> Option<Arc<HashSet<CertificateTag>>> {
        self.passes_left = self.passes_left.checked_sub(1)?;
        Some(if self.passes_left == 0 {
            std::mem::take(&mut self.certificates)
        } else {
            Arc::clone(&self.certificates)
        })
    }
}

/// TLS of one listener, with its files.
pub struct Endpoint {
    files: Files,
    /// Shared by all generations: a ticket outlives a renewed certificate.
    ticketer: Arc<dyn ProducesTickets>,
    current: ArcSwap<Loaded>,
    /// Why the files were rejected at the last reload.
    problem: ArcSwapOption<String>,
    /// Locked only while files are read.
    looked: Mutex<Looked>,
    newly_revoked: Mutex<NewlyRevoked>,
}

/// Result of the last checks of the files.
struct Looked {
    /// Stamps that were last accepted or rejected. They are not read again until one changes.
    settled: Stamps,
    /// Changed stamps, seen once. Files are replaced one after the other, so they are read when two checks agree.
    once: Option<Stamps>,
}

/// Which files are reloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// All: an operator has requested it.
    Now,
    /// Those that have changed, and not since the last check.
    Changed,
}

/// Result of a check.
#[derive(Debug)]
pub enum Reloaded {
    Unchanged,
    Taken,
    Refused(TlsError),
}

/// Why a connection has no TLS.
#[derive(Debug)]
pub enum NoTls {
    /// The client uses another protocol, probably HTTP: it can be answered.
    Plain(TcpStream),
    /// The client left without a byte.
    Silent,
    /// The handshake failed, or took too long.
    Failed(io::Error),
}

impl Endpoint {
    /// # Errors
    /// A file cannot be read or used.
    pub fn open(files: Files) -> Result<Self, TlsError> {
        let ticketer = ring::Ticketer::new().map_err(|error| TlsError::System(error.to_string()))?;
        let settled = files.stamps();
        let loaded = files.read()?.load(&ticketer)?;
        Ok(Self {
            current: ArcSwap::from_pointee(loaded),
            problem: ArcSwapOption::empty(),
            looked: Mutex::new(Looked { settled, once: None }),
            newly_revoked: Mutex::default(),
            files,
            ticketer,
        })
    }

    /// Starts a handshake with the current certificate.
    pub fn accept(&self, tcp: TcpStream) -> Accept<Bounded> {
        let current = self.current.load();
        let config: Arc<ServerConfig> = Arc::clone(&current.server);
        let tcp = Bounded::new(tcp, current.handshake_len_max);
        TlsAcceptor::from(config).accept_with(tcp, |connection| connection.set_buffer_limit(Some(BUFFER_LEN_MAX)))
    }

    /// Runs a handshake within this time.
    ///
    /// # Errors
    /// The client does not use TLS, or the time has passed.
    pub async fn accept_within(&self, tcp: TcpStream, time_max: Duration) -> Result<Transport, NoTls> {
        let handshake = async {
            let mut first = [0];
            match tcp.peek(&mut first).await {
                Ok(0) => Err(NoTls::Silent),
                Ok(_) if is_tls(first[0]) => Ok(self.accept(tcp).await.map_err(NoTls::Failed)?),
                Ok(_) => Err(NoTls::Plain(tcp)),
                Err(error) => Err(NoTls::Failed(error)),
            }
        };
        let tls = timeout(time_max, handshake)
            .await
            .map_err(|_| NoTls::Failed(io::ErrorKind::TimedOut.into()))??;
        Ok(tls.into())
    }

    /// Checks the files, and loads them if they are valid. Blocks.
    pub fn reload(&self, which: Reload) -> Reloaded {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken before the files are read, so that the next check sees a change meanwhile.
        let stamps = self.files.stamps();
        if which == Reload::Changed {
            if stamps == looked.settled {
                looked.once = None;
                return Reloaded::Unchanged;
            }
            // A missing file is reported at once.
            if stamps.iter().all(Option::is_some) && looked.once != Some(stamps) {
                looked.once = Some(stamps);
                return Reloaded::Unchanged;
            }
        }
        looked.once = None;
        let loaded = self.files.read().and_then(|contents| contents.load(&self.ticketer));
        // An unreadable file may be valid: the process may be out of files. It is retried, and reported once.
        if !matches!(loaded, Err(TlsError::Unreadable { .. })) {
            looked.settled = stamps;
        }
        match loaded {
            Ok(loaded) => {
                let loaded = Arc::new(loaded);
                let previous = self.current.swap(Arc::clone(&loaded));
                self.newly_revoked()
                    .add(loaded.revoked.difference(&previous.revoked).copied());
                self.problem.store(None);
                Reloaded::Taken
            }
            Err(error) => {
                let problem = Some(Arc::new(error.to_string()));
                let is_known = self.problem.swap(problem.clone()) == problem;
                if is_known && which == Reload::Changed {
                    return Reloaded::Unchanged;
                }
                Reloaded::Refused(error)
            }
        }
    }

    fn newly_revoked(&self) -> MutexGuard<'_, NewlyRevoked> {
        self.newly_revoked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the files were rejected at the last reload, if they were.
    #[must_use]
    pub fn problem(&self) -> Option<Arc<String>> {
        self.problem.load_full()
    }

    /// Expiry of the first certificate in use to expire.
    #[must_use]
    pub fn expires(&self) -> WallTime {
        self.current.load().expires
    }
}

/// Whether a connection that begins with this byte uses TLS.
#[must_use]
pub const fn is_tls(first: u8) -> bool {
    first == HANDSHAKE_RECORD
}

/// The device that the client's certificate names, if it sent one.
#[must_use]
pub fn certified(tls: &TlsStream<Bounded>) -> Option<Certified> {
    let connection: &ServerConnection = tls.get_ref().1;
    certified::read(connection.peer_certificates()?.first()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_newly_revoked_certificate_is_looked_for_a_few_times_and_not_for_ever() {
        let [one, two] = [CertificateTag::of(b"ca", b"1"), CertificateTag::of(b"ca", b"2")];
        let mut revoked = NewlyRevoked::default();
        assert!(revoked.take().is_none());

        revoked.add([one].into_iter());
        assert_eq!(*revoked.take().unwrap(), HashSet::from([one]));
        revoked.add([two].into_iter());
        for _ in 0..REVOKED_PASSES {
            assert_eq!(*revoked.take().unwrap(), HashSet::from([one, two]));
        }

        assert!(revoked.take().is_none());
        revoked.add([].into_iter());
        assert!(revoked.take().is_none());
    }
}
