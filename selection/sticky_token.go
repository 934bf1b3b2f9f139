package selection

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"hash"
	"sync"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// A token is base64url of
//
//	name    8 bytes  which endpoint
//	expiry  5 bytes  Unix seconds, 0 for never
//	proof  16 bytes  that a proxy with the secret wrote it
//
// An endpoint's digest is HMAC-SHA256(secret, hash key); the name is its first 8 bytes, and the proof is the next 16, or,
// with an expiry, the first 16 of HMAC-SHA256(secret, digest || expiry). So the name finds the endpoint in a map, and the
// proof, which no map has seen, is compared in constant time.
const (
	nameSize   = 8
	expirySize = 5
	proofSize  = 16
	tokenSize  = nameSize + expirySize + proofSize
)

var tokenCoding = base64.RawURLEncoding.Strict()

// processSecret is the secret where none is configured. It outlives configurations, so a reload breaks no session.
var processSecret = sync.OnceValue(func() []byte {
	secret := make([]byte, sha256.Size)
	_, _ = rand.Read(secret) // It never fails.
	return secret
})

// now is replaced by tests.
var now = time.Now

// minter makes digests with one secret. The states of HMAC are kept, since a pick may not allocate.
type minter struct{ states sync.Pool }

type hmacState struct {
	hash.Hash
	buf [sha256.Size + 8]byte
	sum [sha256.Size]byte
}

func newMinter(secret []byte) *minter {
	m := new(minter)
	m.states.New = func() any { return &hmacState{Hash: hmac.New(sha256.New, secret)} }
	return m
}

// proof returns the proof for the endpoint's digest and an expiry.
func (m *minter) proof(digest *[sha256.Size]byte, expiry uint64) (p [proofSize]byte) {
	if expiry == 0 {
		copy(p[:], digest[nameSize:])
		return p
	}
	st := m.states.Get().(*hmacState)
	n := copy(st.buf[:], digest[:])
	binary.BigEndian.PutUint64(st.buf[n:], expiry)
	st.Reset()
	_, _ = st.Write(st.buf[:])
	copy(p[:], st.Sum(st.sum[:0]))
	m.states.Put(st)
	return p
}

// mint makes the tokens for the endpoints.
func (m *minter) mint(endpoints []upstream.Endpoint) *tokens {
	t := &tokens{minter: m, digests: make([][sha256.Size]byte, len(endpoints)), byName: make(map[uint64]int32, len(endpoints))}
	st := m.states.Get().(*hmacState)
	defer m.states.Put(st)
	var key []byte
	for i := range endpoints {
		key = append(key[:0], endpoints[i].HashKey()...)
		st.Reset()
		_, _ = st.Write(key)
		st.Sum(t.digests[i][:0])
		name := binary.BigEndian.Uint64(t.digests[i][:])
		if _, taken := t.byName[name]; !taken { // The same key twice: the first has it.
			t.byName[name] = int32(i)
		}
	}
	return t
}

// tokens are those of a snapshot's endpoints.
type tokens struct {
	minter  *minter
	digests [][sha256.Size]byte
	byName  map[uint64]int32
}

// text is a new token for the endpoint at the place.
func (t *tokens) text(place int, maxAge time.Duration) string {
	var (
		raw    [tokenSize]byte
		expiry uint64
	)
	if maxAge > 0 {
		expiry = uint64(now().Add(maxAge).Unix())
	}
	digest := &t.digests[place]
	copy(raw[:nameSize], digest[:])
	putExpiry(raw[nameSize:], expiry)
	proof := t.minter.proof(digest, expiry)
	copy(raw[nameSize+expirySize:], proof[:])
	return tokenCoding.EncodeToString(raw[:])
}

// find returns the place of the endpoint that the token names, and how long the token is still good for. If tokens are to
// expire, one that does not is not good.
func (t *tokens) find(text string, expire bool) (place int, left time.Duration, ok bool) {
	var raw [tokenSize]byte
	if len(text) != tokenCoding.EncodedLen(tokenSize) {
		return 0, 0, false
	}
	var coded [(tokenSize*8 + 5) / 6]byte
	copy(coded[:], text)
	if n, err := tokenCoding.Decode(raw[:], coded[:]); err != nil || n != tokenSize {
		return 0, 0, false
	}
	at, ok := t.byName[binary.BigEndian.Uint64(raw[:])]
	if !ok {
		return 0, 0, false
	}
	expiry := getExpiry(raw[nameSize:])
	proof := t.minter.proof(&t.digests[at], expiry)
	if subtle.ConstantTimeCompare(raw[nameSize+expirySize:], proof[:]) != 1 {
		return 0, 0, false
	}
	if expiry == 0 {
		return int(at), 0, !expire
	}
	left = time.Unix(int64(expiry), 0).Sub(now())
	return int(at), left, left > 0
}

func putExpiry(b []byte, seconds uint64) {
	for i := expirySize - 1; i >= 0; i-- {
		b[i] = byte(seconds)
		seconds >>= 8
	}
}

func getExpiry(b []byte) (seconds uint64) {
	for _, c := range b[:expirySize] {
		seconds = seconds<<8 | uint64(c)
	}
	return seconds
}
