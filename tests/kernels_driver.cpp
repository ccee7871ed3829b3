// Runs the operators of kernels.cpp over memory of exactly the sizes that they may touch, for a memory checker.
#include "../layers/kernels.cpp"

template <class T, class E>
static void run(int N, int G, int P, int S, int D, int T_, int L, int threads) {
    int H = G * P;
    std::vector<T> q(N * H * S * D), out(q.size());
    std::vector<E> k(G * T_ * D), v(k.size());
    std::vector<T> own_k(N * G * L * D), own_v(own_k.size()), scale(G * T_), channel(G * D);
    std::vector<float> lse(N * H * S), slopes(H, 0.5f);
    std::vector<int64_t> position(N * S), start(N, T_), zero(N, 0), length(1, T_ - 1);
    for (int n = 0; n < N; n++)
        for (int s = 0; s < S; s++) position[n * S + s] = T_ + std::min(L - 1, n % 3 + s);
    int64_t type = sizeof(T) == 4 ? FLOAT : BFLOAT16, d = D;
    for (int window = 0; window < 6; window += 5) {
        Part parts[2] = {
            {{own_k.data(), own_v.data()}, {G * L * d, G * L * d}, {L * d, L * d}, {d, d}, {}, {}, {}, {}, start.data(),
             nullptr, nullptr, nullptr, N, L, type},
            {{k.data(), v.data()}, {G * T_ * d, G * T_ * d}, {T_ * d, T_ * d}, {d, d}, {scale.data(), scale.data()},
             {G * T_, G * T_}, {T_, T_}, {1, 1}, zero.data(), zero.data(), window ? length.data() : nullptr,
             sizeof(E) == 1 ? channel.data() : nullptr, 1, T_,
             sizeof(E) == 1 ? int64_t(INT8) : type}};
        Call call{q.data(), H * S * d, S * d, d, out.data(), lse.data(), position.data(), window ? slopes.data() : nullptr,
                  N, H, S, D, G, window, type, threads, 2};
        attend(&call, parts, 0.1f, window);
    }
}

template <class T>
static void run_product(int rows, int outputs, int inputs, int group, int threads) {
    std::vector<T> x(rows * inputs), y(rows * outputs);
    std::vector<int8_t> values(outputs * inputs / (group ? 2 : 1), 77);
    std::vector<bf16> scales(group ? outputs * inputs / group : outputs), zeros(scales.size());
    int64_t type = sizeof(T) == 4 ? FLOAT : BFLOAT16;
    Product product{x.data(), y.data(), values.data(), scales.data(), group ? zeros.data() : nullptr,
                    rows, outputs, inputs, group ? group : inputs, type, threads};
    multiply(&product);
}

int main() {
    for (int threads = 1; threads < 3; threads++) {
        run<float, float>(1, 2, 1, 1, 64, 700, 3, threads);
        run<float, float>(5, 2, 3, 2, 10, 61, 4, threads);
        run<float, float>(1, 1, 1, 131, 59, 5, 140, threads);
        run<bf16, bf16>(3, 2, 1, 1, 48, 119, 2, threads);
        run<bf16, bf16>(33, 1, 4, 1, 256, 7, 5, threads);
        run<float, int8_t>(2, 2, 1, 1, 32, 65, 4, threads);
        run<bf16, int8_t>(7, 2, 3, 1, 80, 1, 4, threads);
        for (int rows : {1, 3, 4, 5, 17, 129})
            for (int group : {0, 32, 96}) {
                run_product<float>(rows, 53, 288, group, threads);
                run_product<bf16>(rows, 7, 96, group, threads);
            }
    }
}
