//! Client certificates against revocation lists. Start with [`Verifier`].
//!
//! rustls has one rule for a whole chain: either each certificate in it needs a list, or none does. Here a device's certificate needs the
//! list of its authority; the authorities between it and the root are held against whatever lists there are.

use std::{cmp::Reverse, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use seawall_proto::time::WallTime;
use webpki::{
    CertRevocationList, EndEntityCert, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};
use x509_parser::{prelude::FromDer, revocation_list::CertificateRevocationList};

use super::files::wall;

/// Verifies chains of client certificates by roots and revocation lists.
#[derive(Debug)]
pub struct Verifier {
    /// For everything but the chain.
    handshake: Arc<dyn ClientCertVerifier>,
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    /// At least one. Of two of one authority the first counts.
    lists: Vec<CertRevocationList<'static>>,
}

impl Verifier {
    /// `handshake` does everything but the chain.
    ///
    /// # Errors
    /// One of the lists can't be used.
    pub fn new(
        handshake: Arc<dyn ClientCertVerifier>,
        roots: Arc<RootCertStore>,
        algorithms: WebPkiSupportedAlgorithms,
        lists: &[CertificateRevocationListDer<'_>],
    ) -> Result<Self, webpki::Error> {
        let lists = newest_first(lists)
            .into_iter()
            .map(|list| OwnedCertRevocationList::from_der(list).map(CertRevocationList::Owned))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            handshake,
            roots,
            algorithms,
            lists,
        })
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), webpki::Error> {
        let leaf = EndEntityCert::try_from(leaf)?;
        let lists: Vec<_> = self.lists.iter().collect();
        let check = |depth, unknown| {
            let options = RevocationOptionsBuilder::new(&lists).map_err(|_| webpki::Error::UnknownRevocationStatus)?;
            leaf.verify_for_usage(
                self.algorithms.all,
                &self.roots.roots,
                intermediates,
                now,
                KeyUsage::client_auth(),
                Some(options.with_depth(depth).with_status_policy(unknown).build()),
                None,
            )
            .map(|_| ())
        };
        match check(RevocationCheckDepth::Chain, UnknownStatusPolicy::Deny) {
            // Of one in the chain. Not of the first, or the second look fails; and none that is on a list gets past the third.
            Err(webpki::Error::UnknownRevocationStatus) => {
                check(RevocationCheckDepth::EndEntity, UnknownStatusPolicy::Deny)?;
                check(RevocationCheckDepth::Chain, UnknownStatusPolicy::Allow)
            }
            verified => verified,
        }
    }
}

impl ClientCertVerifier for Verifier {
    fn offer_client_auth(&self) -> bool {
        self.handshake.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.handshake.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.handshake.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, intermediates, now)
            .map(|()| ClientCertVerified::assertion())
            .map_err(|error| Error::InvalidCertificate(reason(error)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.handshake.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.handshake.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.handshake.supported_verify_schemes()
    }
}

/// What the peer is told by the alert, as far as there is one for it (RFC 8446 §6.2).
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the library's errors are open-ended, and the rest share an alert"
)]
fn reason(error: webpki::Error) -> CertificateError {
    match error {
        webpki::Error::CertRevoked => CertificateError::Revoked,
        webpki::Error::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::CertExpired { .. } => CertificateError::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
}

/// An older list of an authority, left in the file before or behind a newer one, must not let in whom the newer one names.
fn newest_first<'a, 'b>(lists: &'a [CertificateRevocationListDer<'b>]) -> Vec<&'a CertificateRevocationListDer<'b>> {
    let mut lists: Vec<_> = lists.iter().collect();
    lists.sort_by_cached_key(|list| {
        let parsed = CertificateRevocationList::from_der(list).ok();
        Reverse(parsed.map(|(_, list)| list.last_update().timestamp()))
    });
    lists
}

/// When the first of these lists should have been replaced by a newer one; `None` where none says so.
pub fn next_update(lists: &[CertificateRevocationListDer<'_>]) -> Option<WallTime> {
    lists
        .iter()
        .filter_map(|list| {
            let (_, list) = CertificateRevocationList::from_der(list).ok()?;
            list.next_update().map(wall)
        })
        .min()
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair,
        KeyUsagePurpose, SerialNumber, date_time_ymd,
    };

    use super::*;

    #[test]
    fn newest_list_of_an_authority_counts_wherever_it_stands_in_the_file() {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::CrlSign];
        let issuer = Issuer::new(params, KeyPair::generate().unwrap());
        let list = |year| {
            let params = CertificateRevocationListParams {
                this_update: date_time_ymd(year, 1, 1),
                next_update: date_time_ymd(2100, 1, 1),
                crl_number: SerialNumber::from(1),
                issuing_distribution_point: None,
                revoked_certs: Vec::new(),
                key_identifier_method: KeyIdMethod::Sha256,
            };
            CertificateRevocationListDer::from(params.signed_by(&issuer).unwrap())
        };
        let [old, new] = [list(2025), list(2026)];

        for lists in [[old.clone(), new.clone()], [new.clone(), old.clone()]] {
            assert_eq!(newest_first(&lists), [&new, &old]);
        }
    }
}
