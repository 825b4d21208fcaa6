//! Who is behind the relay: a table like a NAT's, one entry for each client address, bounded, forgetting the idle.
//! Pure: times are arguments. Must not know: sockets.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

/// Names a client for as long as the relay runs; never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub u64);

#[derive(Debug)]
struct Client {
    address: SocketAddr,
    last_used: Duration,
}

/// The answer to "who is this?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Known before.
    Known(ClientId),
    /// In the table from now on: make a socket for it.
    New(ClientId),
    /// The table is full of clients that are in use.
    Full,
}

/// The table.
#[derive(Debug)]
pub struct Clients {
    by_address: HashMap<SocketAddr, ClientId>,
    by_id: HashMap<ClientId, Client>,
    next_id: u64,
    limit: usize,
    idle: Duration,
}

impl Clients {
    /// An empty table of at most `limit` clients; one that was silent both ways for `idle` may be forgotten.
    pub fn new(limit: usize, idle: Duration) -> Clients {
        Clients { by_address: HashMap::new(), by_id: HashMap::new(), next_id: 1, limit, idle }
    }

    /// Finds or adds the client at this address and marks it as used.
    pub fn find(&mut self, address: SocketAddr, now: Duration) -> Lookup {
        if let Some(&id) = self.by_address.get(&address) {
            self.touch(id, now);
            return Lookup::Known(id);
        }
        if self.by_id.len() >= self.limit {
            return Lookup::Full;
        }
        let id = ClientId(self.next_id);
        self.next_id += 1;
        self.by_address.insert(address, id);
        self.by_id.insert(id, Client { address, last_used: now });
        Lookup::New(id)
    }

    /// Marks a client as used.
    pub fn touch(&mut self, id: ClientId, now: Duration) {
        if let Some(client) = self.by_id.get_mut(&id) {
            client.last_used = client.last_used.max(now);
        }
    }

    /// Where a client is, while it is in the table.
    pub fn address(&self, id: ClientId) -> Option<SocketAddr> {
        self.by_id.get(&id).map(|client| client.address)
    }

    /// Takes a client out.
    pub fn remove(&mut self, id: ClientId) {
        if let Some(client) = self.by_id.remove(&id) {
            self.by_address.remove(&client.address);
        }
    }

    /// Takes out all that were idle too long and says who they were.
    pub fn expire(&mut self, now: Duration) -> Vec<ClientId> {
        let is_idle = |client: &Client| now.saturating_sub(client.last_used) >= self.idle;
        let gone: Vec<ClientId> = self.by_id.iter().filter(|(_, c)| is_idle(c)).map(|(id, _)| *id).collect();
        for id in &gone {
            self.remove(*id);
        }
        gone
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn each_address_is_one_client_and_the_table_is_bounded() {
        let mut clients = Clients::new(2, Duration::from_secs(10));
        let s = Duration::from_secs;
        let Lookup::New(a) = clients.find(address(1), s(0)) else { panic!("new") };
        assert_eq!(clients.find(address(1), s(1)), Lookup::Known(a));
        let Lookup::New(b) = clients.find(address(2), s(1)) else { panic!("new") };
        assert_ne!(a, b);
        assert_eq!(clients.find(address(3), s(1)), Lookup::Full);
        assert_eq!(clients.address(a), Some(address(1)));
    }

    #[test]
    fn the_idle_are_forgotten_and_ids_are_not_given_again() {
        let mut clients = Clients::new(2, Duration::from_secs(10));
        let s = Duration::from_secs;
        let Lookup::New(a) = clients.find(address(1), s(0)) else { panic!("new") };
        let Lookup::New(b) = clients.find(address(2), s(0)) else { panic!("new") };
        clients.touch(b, s(5));
        assert_eq!(clients.expire(s(9)), []);
        assert_eq!(clients.expire(s(10)), [a]);
        assert_eq!(clients.address(a), None);
        let Lookup::New(c) = clients.find(address(1), s(10)) else { panic!("new") };
        assert_ne!(a, c);
        assert_eq!(clients.len(), 2);
    }
}
