//! Registry data of a device: the result of a lookup, and all that the connect path may use.

use serde::{Deserialize, Serialize};

use crate::{
    id::{Credential, CredentialTag, DeviceId, Label, SecretHash},
    time::WallTime,
};

/// One registered device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRecord {
    pub id: DeviceId,
    /// `default` unless set.
    pub tenant: Label,
    /// The registry's model, used if the device names none.
    pub model: Option<Label>,
    pub secret: SecretHash,
    /// The credential before the last rotation, and the time at which it becomes invalid.
    pub previous_secret: Option<(SecretHash, WallTime)>,
    pub state: DeviceState,
}

impl DeviceRecord {
    /// Whether `presented` is valid for the device: its secret, the previous one within the overlap of a rotation, or a
    /// certificate, whose owner TLS has verified.
    ///
    /// Both comparisons always run, in constant time. So the time of the answer reveals neither the secret nor a
    /// rotation.
    #[must_use]
    pub fn accepts(&self, presented: &Credential, wall: WallTime) -> bool {
        let presented = match presented {
            Credential::Secret(hash) => hash,
            Credential::Certificate(_) => return true,
        };
        let is_current = self.secret == *presented;
        let (previous, valid_until) = self.previous_secret.unwrap_or((self.secret, WallTime::default()));
        let is_previous = previous == *presented;
        is_current | (is_previous & (wall < valid_until))
    }

    /// The secrets that it [accepts](Self::accepts) now. None if the device is revoked.
    #[must_use]
    pub fn right(&self, wall: WallTime) -> [Option<CredentialTag>; 2] {
        let tag = |secret: SecretHash| CredentialTag::from(&Credential::Secret(secret));
        let previous = self.previous_secret.filter(|(_, until)| wall < *until);
        let right = [Some(tag(self.secret)), previous.map(|(secret, _)| tag(secret))];
        right.map(|secret| secret.filter(|_| self.state != DeviceState::Revoked))
    }

    /// Whether a session with this credential may stay: its secret was not replaced since, or the overlap of the
    /// rotation has not ended.
    #[must_use]
    pub fn still_accepts(&self, tag: CredentialTag, wall: WallTime) -> bool {
        let is_previous = |(secret, until): &(SecretHash, WallTime)| tag.may_be(secret) && wall < *until;
        tag.may_be(&self.secret) || self.previous_secret.as_ref().is_some_and(is_previous)
    }

    /// End of a credential that [is accepted](Self::accepts): the previous secret has one.
    #[must_use]
    pub fn ends(&self, accepted: &Credential) -> Option<WallTime> {
        match accepted {
            Credential::Secret(hash) if *hash != self.secret => {
                self.previous_secret.map(|(_, valid_until)| valid_until)
            }
            Credential::Secret(_) | Credential::Certificate(_) => None,
        }
    }
}

crate::labels! {
    /// Whether a device may connect.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum DeviceState {
        Enabled = "enabled",
        /// Temporarily; the device is told to return later.
        Disabled = "disabled",
        /// Permanently; the device gets no hint, and should not return.
        Revoked = "revoked",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(previous_secret: Option<(SecretHash, WallTime)>) -> DeviceRecord {
        DeviceRecord {
            id: "9b0c2e4a-11d2-7f00-8000-0000000000aa".parse().unwrap(),
            tenant: Label::parse("default").unwrap().unwrap(),
            model: None,
            secret: SecretHash::of(b"new"),
            previous_secret,
            state: DeviceState::Enabled,
        }
    }

    #[test]
    fn certificate_is_accepted_and_does_not_end_with_a_secret() {
        let record = record(Some((SecretHash::of(b"old"), WallTime::from_unix_ms(10))));
        let certificate = Credential::of_certificate(b"der", crate::id::CertificateTag::of(b"ca", b"1"));

        assert!(record.accepts(&certificate, WallTime::from_unix_ms(99)));
        assert_eq!(record.ends(&certificate), None);
        assert_ne!(certificate.hash(), &SecretHash::of(b"der"));
    }

    #[test]
    fn only_the_secret_is_accepted_where_none_was_rotated() {
        let record = record(None);

        assert!(record.accepts(&SecretHash::of(b"new").into(), WallTime::from_unix_ms(5)));
        assert!(!record.accepts(&SecretHash::of(b"old").into(), WallTime::from_unix_ms(5)));
    }

    #[test]
    fn previous_secret_counts_until_its_overlap_ends() {
        let record = record(Some((SecretHash::of(b"old"), WallTime::from_unix_ms(10))));

        assert!(record.accepts(&SecretHash::of(b"old").into(), WallTime::from_unix_ms(9)));
        assert!(!record.accepts(&SecretHash::of(b"old").into(), WallTime::from_unix_ms(10)));
        assert!(record.accepts(&SecretHash::of(b"new").into(), WallTime::from_unix_ms(10)));
    }

    #[test]
    fn session_keeps_its_credential_until_it_is_replaced_or_its_overlap_ends() {
        let record = record(Some((SecretHash::of(b"old"), WallTime::from_unix_ms(10))));
        let accepts = |secret: &[u8], ms| {
            let credential = Credential::from(SecretHash::of(secret));
            record.still_accepts((&credential).into(), WallTime::from_unix_ms(ms))
        };

        assert!(accepts(b"new", 99) && accepts(b"old", 9));
        assert!(!accepts(b"old", 10) && !accepts(b"stolen", 9));
        let certificate = Credential::of_certificate(b"der", crate::id::CertificateTag::of(b"ca", b"1"));
        assert!(record.still_accepts((&certificate).into(), WallTime::from_unix_ms(99)));
    }
}
