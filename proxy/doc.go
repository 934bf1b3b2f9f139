// Package proxy carries one call from its head to its result. It knows neither net/http nor Caddy: an inbound (inbound/web,
// inbound/direct) has the client's side, package transport the upstream's, and a [Flight] is pushed by both. It owns no goroutine and
// never waits.
//
// # One RPC, from start to end
//
//  1. An inbound fills in Flight.Call and Flight.Request and calls [Proxy.Serve] with itself as the [Downstream]. From here on
//     everything that happens to the call is an event (Flight.push): the goroutine that finds nobody running the flight runs it
//     until no event is left (Flight.run); everybody else leaves a copy and goes on. So events of one call are handled one after
//     the other, and no lock is held meanwhile.
//  2. Flight.start splits the path and settles the deadline (Flight.classify), sets the flight's one timer (timer.go), and enters
//     the registry of those that run (drain.go).
//  3. Flight.choose (choose.go) looks for an endpoint: the picker of the cluster's View names one, Flight.attempt counts the call
//     there, Flight.makeHead (head.go) builds its header block, and Flight.try asks transport for a stream. There is one at once
//     (Flight.opened), or the attempt is parked there as data, and transport tells it later (attempt.Opened, attempt.Refused). A
//     parked call goes to another endpoint when that has room (Flight.moveOn). Where no endpoint can be used, the call waits for news
//     from the cluster (cluster.Waiter, Flight.news).
//  4. The client's data comes as Flight.Data. Flight.take (request.go) writes it to the attempt's stream, as far as its windows allow,
//     and keeps it for another try (replay.go) until the call commits or there is too much of it. The rest follows when the stream takes
//     more (attempt.RecvWriteReady, Flight.feed). The client is given credit for what has gone on (Downstream.Consumed).
//  5. What comes back is told to the attempt, on its connection's reading goroutine (attempt.RecvHead, RecvData, RecvTrailers,
//     RecvReset). An attempt whose stream fails before the call has committed may be repeated (Flight.failed): Flight.decide says
//     whether, and nothing else does.
//  6. A gRPC response head commits the call to its attempt (Flight.head, Flight.commit): from here on the answer goes to the client as
//     it comes (answer.go). What the client's side does not take stays with the flight until Flight.Writable, and the upstream is given
//     credit for what has left. An answer that is not gRPC stays with its attempt and becomes a status (Flight.foreignEnd).
//  7. Trailers end the answer (Flight.ending): a status that clients could not read is repaired (Flight.wireStatus). When all of it
//     has left, the call is complete (Flight.complete).
//  8. A call that fails becomes a [Failure] (status.go): a gRPC code and a message. Flight.conclude sends it as Trailers-Only before the
//     commit, as trailers after it if a message has just ended, and as a reset inside a message. A client that is gone is told
//     nothing (Flight.abandon).
//  9. Flight.finish computes the Result, once, and tells policy, health and observers. Downstream.Done is the last thing that the
//     flight says, but for [Recycler], if nobody else has the flight any more (recycle.go).
//
// Writes do not go out by themselves. Flight.flush lets them: at the end of the reader's batch, when a connection's reader runs the
// flight, so that one system call carries the frames of many calls; at once otherwise.
//
// # LOCKS
//
// These are all mutexes of the project. Nobody holds two of them at once but along an arrow. None is held while a goroutine waits for
// something else than a mutex, nor during a call of a policy, a source, an Opener, a Downstream or a h2.Receiver.
//
//	proxy        Flight.mu           the queue of events, and who runs
//	             drainShard.mu       the flights that run
//	             cancels.mu          what clients have cancelled
//	inbound/web  exchange.mu         what is queued for the writer; a deadline of the answer is set with it held
//	inbound/hop  Hop.mu              the connections to the server → h2's Conn.mu of a stream that is opened
//	             flow.mu             what one side of a stream has not taken yet → h2's Conn.mu
//	             half.mu             the bytes in one direction of a pipe
//	inbound/     hubs.mu             the addresses that there are → hub.mu
//	listen       hub.mu              listeners and connections of an address → h2's Conn.mu of one that is new
//	             Listener.mu         connections for the server
//	             pending.mu          connections that have not said yet what they speak
//	inbound/     Table.mu            where calls go
//	route
//	cluster      Cluster.mu          members, sources' lists, what views are made of
//	                                 → lastList.mu, waiting.mu, and what transport and upstream have
//	             waiting.mu          calls that wait for an endpoint
//	             lastList.mu         a source's last list, for the next configuration
//	transport    Endpoint.mu         connections, line, backoff → Link.mu, and h2's Conn.mu for how many streams are free. Its Unlock
//	                                 tells watchers and the calls that were turned away, when nobody holds it (mutex)
//	             Endpoint.tls.mu     the TLS configuration in use
//	             clients.mu          the parts of an endpoint that clients have → Endpoint.mu of a part
//	upstream     Link.mu             which States show it → State.mu
//	             State.mu            reasons, watchers, memory
//	             Load.mu             which States have a limit
//	h2           Conn.mu             a connection and its streams → Budget.mu
//	             Budget.mu           the connections that share it
//	             Blocking.mu         what a goroutine has not read yet
//	healthcheck  roster.mu           the checks of an endpoint → checker.mu
//	             checker.mu          one check's verdict → memory.mu, votes.mu
//	             memory.mu           what the next check of the same goes on from
//	             votes.mu            what all checks of an endpoint think → State.mu
//	             connections.mu      the connections that checks have for themselves
//	             Passive.mu          the endpoints that are compared with each other → record.mu
//	             record.mu           what attempts on an endpoint came to
//	selection    workload.mu         what the work of an endpoint was when it was last measured
//	discovery    joined.mu           the list of several sources; it is held while the sink is told, so that it hears them in order
//	root         configurations.mu   the configurations that run
//	             Health.mu           who watches grpc_health
//	             events.mu           events for Caddy's handlers
//	             tlsFiles.mu         TLS files as they were read last
//	             identityList.mu     names of transports
//	             streamMemory.mu     limits of all handlers
//	             Relay.mu            listeners of a server
package proxy
