//! HTTP client of the node: for its webhook, and for the configuration that nodes share.

use std::{sync::Arc, time::Duration};

use rustls_native_certs::load_native_certs;
use ureq::{
    Agent,
    tls::{Certificate, RootCerts, TlsConfig},
};

/// A client that trusts the authorities of the system, follows no redirect and uses no proxy. `time_max` is that of a
/// whole request with its answer.
pub fn agent(connect_max: Duration, time_max: Duration) -> Agent {
    let authorities: Vec<_> = load_native_certs()
        .certs
        .iter()
        .map(|der| Certificate::from_der(der).to_owned())
        .collect();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(authorities)))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .user_agent(concat!("seawall/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(connect_max))
        .timeout_global(Some(time_max))
        .tls_config(tls)
        .build()
        .into()
}
