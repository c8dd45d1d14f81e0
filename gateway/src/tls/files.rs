//! From PEM files to a configuration of rustls. Every error names the setting and the file.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, ProducesTickets, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use seawall_proto::time::WallTime;
use sha2::{Digest as _, Sha256};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use crate::config::Config;

/// Greatest file, in bytes: a list of a million revoked certificates is about 40 MB.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// What distinguishes one content of all files from another.
pub type Digest = [u8; 32];

/// The files of one listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    pub certificate: Source,
    pub key: Source,
    pub clients: Option<ClientFiles>,
}

/// What client certificates are verified with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    pub ca: Source,
    pub crl: Option<Source>,
    /// A client without a certificate is sent away.
    pub is_required: bool,
}

/// One file and the setting that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub setting: &'static str,
    pub path: PathBuf,
}

/// Why files can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{}: {} can't be read: {source}", at.setting, at.path.display())]
    Unreadable { at: Source, source: std::io::Error },
    #[error("{}: {}: {problem}", at.setting, at.path.display())]
    Invalid { at: Source, problem: String },
    /// The operating system gives no randomness.
    #[error("TLS can't be set up: {0}")]
    System(String),
}

/// A configuration, and when the first certificate in it ends.
pub struct Loaded {
    pub server: Arc<ServerConfig>,
    pub expires: WallTime,
}

/// Everything that the files of one listener hold.
pub struct Contents<'a> {
    files: &'a Files,
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
    crl: Vec<u8>,
}

impl Source {
    fn new(setting: &'static str, path: &Path) -> Self {
        Self {
            setting,
            path: path.to_owned(),
        }
    }

    fn read(&self) -> Result<Vec<u8>, TlsError> {
        let unreadable = |source| TlsError::Unreadable {
            at: self.clone(),
            source,
        };
        let len = fs::metadata(&self.path).map_err(unreadable)?.len();
        if len > FILE_BYTES_MAX {
            return Err(self.invalid(format!("{len} bytes are more than {FILE_BYTES_MAX}")));
        }
        fs::read(&self.path).map_err(unreadable)
    }

    fn invalid(&self, problem: impl Into<String>) -> TlsError {
        TlsError::Invalid {
            at: self.clone(),
            problem: problem.into(),
        }
    }
}

impl Files {
    /// Those of the listener for devices; `None` where it speaks plain TCP.
    #[must_use]
    pub fn of_devices(config: &Config) -> Option<Self> {
        let tls = &config.tls;
        Some(Self {
            certificate: Source::new("tls.certificate", tls.certificate.as_deref()?),
            key: Source::new("tls.key", tls.key.as_deref()?),
            clients: tls.client_ca.as_deref().map(|ca| ClientFiles {
                ca: Source::new("tls.client_ca", ca),
                crl: tls.client_crl.as_deref().map(|crl| Source::new("tls.client_crl", crl)),
                is_required: tls.client_certificate_required,
            }),
        })
    }

    /// Those of the listener for the API; `None` where it speaks plain TCP.
    #[must_use]
    pub fn of_ops(config: &Config) -> Option<Self> {
        Some(Self {
            certificate: Source::new("ops.tls_certificate", config.ops.tls_certificate.as_deref()?),
            key: Source::new("ops.tls_key", config.ops.tls_key.as_deref()?),
            clients: None,
        })
    }

    /// # Errors
    /// A file can't be read.
    pub fn read(&self) -> Result<Contents<'_>, TlsError> {
        let optional = |source: Option<&Source>| source.map_or(Ok(Vec::new()), Source::read);
        let clients = self.clients.as_ref();
        Ok(Contents {
            files: self,
            certificate: self.certificate.read()?,
            key: self.key.read()?,
            ca: optional(clients.map(|clients| &clients.ca))?,
            crl: optional(clients.and_then(|clients| clients.crl.as_ref()))?,
        })
    }
}

impl Contents<'_> {
    /// The gateway's certificate and what stands between it and its root.
    ///
    /// # Errors
    /// There is none.
    pub fn chain(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(&self.files.certificate, &self.certificate)
    }

    /// The revocation lists; none where there is no such file.
    pub fn lists(&self) -> impl Iterator<Item = CertificateRevocationListDer<'static>> {
        // Those that can't be read have been told by `load`.
        CertificateRevocationListDer::pem_slice_iter(&self.crl).filter_map(Result::ok)
    }

    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut hash = Sha256::new();
        for content in [&self.certificate, &self.key, &self.ca, &self.crl] {
            hash.update(content.len().to_be_bytes());
            hash.update(content);
        }
        hash.finalize().into()
    }

    /// # Errors
    /// What the files hold can't be used, or doesn't fit together.
    pub fn load(&self, ticketer: &Arc<dyn ProducesTickets>) -> Result<Loaded, TlsError> {
        let chain = self.chain()?;
        let at_key = &self.files.key;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| at_key.invalid(format!("holds no private key as PEM: {error}")))?;
        let expires = expiry(&self.files.certificate, &chain)?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::System(error.to_string()))?;
        let builder = match &self.files.clients {
            Some(clients) => builder.with_client_cert_verifier(self.verifier(clients)?),
            None => builder.with_no_client_auth(),
        };
        let mut server = builder.with_single_cert(chain, key).map_err(|error| {
            if matches!(error, rustls::Error::InconsistentKeys(_)) {
                return at_key.invalid(format!("is not the key of {}", self.files.certificate.path.display()));
            }
            at_key.invalid(format!("can't be used with the certificate: {error}"))
        })?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        if self.files.clients.is_some() {
            // A ticket would stand for a certificate that was revoked, or has ended, since.
            server.send_tls13_tickets = 0;
        } else {
            server.ticketer = Arc::clone(ticketer);
            server.send_tls13_tickets = 1;
        }
        Ok(Loaded {
            server: Arc::new(server),
            expires,
        })
    }

    fn verifier(&self, clients: &ClientFiles) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(&clients.ca, &self.ca)? {
            roots.add(authority).map_err(|error| {
                clients
                    .ca
                    .invalid(format!("holds a certificate that is no authority: {error}"))
            })?;
        }
        let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let mut at = &clients.ca;
        if let Some(crl) = &clients.crl {
            at = crl;
            let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(&self.crl)
                .collect::<Result<_, _>>()
                .map_err(|error| crl.invalid(format!("holds no revocation list as PEM: {error}")))?;
            if lists.is_empty() {
                return Err(crl.invalid("holds no revocation list as PEM"));
            }
            builder = builder.with_crls(lists).only_check_end_entity_revocation();
        }
        if !clients.is_required {
            builder = builder.allow_unauthenticated();
        }
        builder.build().map_err(|error| at.invalid(error.to_string()))
    }
}

/// The certificates of a PEM file, at least one.
///
/// # Errors
/// There is none, or what stands between the lines is no certificate.
fn certificates(at: &Source, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| at.invalid(format!("holds no certificate as PEM: {error}")))?;
    if certificates.is_empty() {
        return Err(at.invalid("holds no certificate as PEM"));
    }
    Ok(certificates)
}

/// When the first of these ends.
fn expiry(at: &Source, chain: &[CertificateDer<'_>]) -> Result<WallTime, TlsError> {
    let mut first = u64::MAX;
    for certificate in chain {
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| at.invalid(format!("is no X.509: {error}")))?;
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
        first = first.min(seconds);
    }
    Ok(WallTime::from_unix_ms(first.saturating_mul(1_000)))
}

/// The one crypto provider of this program.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}
